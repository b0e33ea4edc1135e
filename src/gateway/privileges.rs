//! `server.user`: Forebay binds its ports and reads its keys as root, and then switches to another user
//! permanently.
//!
//! The user is looked up before anything is bound, so that an unknown name is a configuration error. After the
//! switch, no code that clients can trigger runs as root.

use std::ffi::CString;
use std::io;

use crate::error::BuildError;

/// The user to switch to.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct User {
    name: CString,
    uid: libc::uid_t,
    gid: libc::gid_t,
}

impl User {
    /// Looks up a user by name or number.
    ///
    /// # Errors
    ///
    /// The user does not exist, or Forebay may not switch to it.
    pub fn find(name: &str) -> Result<User, BuildError> {
        let wrong = |what: String| BuildError::new("server.user", what);
        let user = look_up(name).map_err(|error| wrong(format!("the user `{name}` cannot be looked up: {error}")))?;
        let user =
            user.ok_or_else(|| wrong(format!("there is no user `{name}`: write another, or add it to the system")))?;
        // SAFETY: it has no arguments and cannot fail.
        let own = unsafe { libc::geteuid() };
        if own != 0 && own != user.uid {
            return Err(wrong(format!(
                "only root can become `{name}`: start Forebay as root, or leave `server.user` out"
            )));
        }
        Ok(user)
    }

    /// The user and group ids, if a switch is needed.
    pub fn to_become(&self) -> Option<(u32, u32)> {
        // SAFETY: it has no arguments and cannot fail.
        let own = unsafe { libc::geteuid() };
        (own == 0).then_some((self.uid, self.gid))
    }

    /// Switches to this user, for all threads and permanently.
    ///
    /// # Errors
    ///
    /// The system does not allow it; the process must not continue then.
    pub fn become_it(&self) -> io::Result<()> {
        // SAFETY: the only pointer is to the name, which outlives the call.
        unsafe {
            if libc::geteuid() != 0 {
                return Ok(());
            }
            checked(libc::initgroups(self.name.as_ptr(), self.gid))?;
            checked(libc::setgid(self.gid))?;
            checked(libc::setuid(self.uid))?;
            // The switch is useless if root could be regained.
            if self.uid != 0 && libc::setuid(0) == 0 {
                return Err(io::Error::other("root could be regained"));
            }
        }
        Ok(())
    }
}

/// Excludes the memory of this process, which contains keys, from core dumps and from other processes of the same
/// user.
pub fn keep_memory_private() {
    // SAFETY: the call has no pointers.
    let done = unsafe { libc::prctl(libc::PR_SET_DUMPABLE, 0, 0, 0, 0) };
    if done != 0 {
        tracing::warn!("core dumps may hold private keys: {}", io::Error::last_os_error());
    }
}

fn checked(result: libc::c_int) -> io::Result<()> {
    if result == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

fn look_up(name: &str) -> io::Result<Option<User>> {
    const ROOM: usize = 16 << 10;
    let text = CString::new(name).map_err(io::Error::other)?;
    let mut room = vec![0; ROOM];
    // SAFETY: all zeros are a value of this type, which is filled before it is read.
    let mut entry: libc::passwd = unsafe { std::mem::zeroed() };
    let mut found = std::ptr::null_mut();
    let number = name.parse::<libc::uid_t>();
    // SAFETY: every pointer is to memory of the given size, and outlives the call.
    let failed = unsafe {
        match number {
            Ok(uid) => libc::getpwuid_r(uid, &raw mut entry, room.as_mut_ptr(), ROOM, &raw mut found),
            Err(_) => libc::getpwnam_r(text.as_ptr(), &raw mut entry, room.as_mut_ptr(), ROOM, &raw mut found),
        }
    };
    if found.is_null() {
        let missing = matches!(failed, 0 | libc::ENOENT | libc::ESRCH | libc::EBADF | libc::EPERM);
        return if missing { Ok(None) } else { Err(io::Error::from_raw_os_error(failed)) };
    }
    // SAFETY: it was found, so its name is a string within `room`.
    let name = unsafe { std::ffi::CStr::from_ptr(entry.pw_name) }.to_owned();
    Ok(Some(User { name, uid: entry.pw_uid, gid: entry.pw_gid }))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_user_is_found_by_name_and_by_number() {
        let root = look_up("root").expect("a list of users").expect("there is always root");
        assert_eq!((root.uid, root.gid, root.name.to_str()), (0, 0, Ok("root")));
        assert_eq!(look_up("0").expect("a list of users"), Some(root));
        assert_eq!(look_up("nobody-of-this-name").expect("a list of users"), None);
        assert_eq!(
            User::find("nobody-of-this-name").expect_err("an error").message,
            "there is no user `nobody-of-this-name`: write another, or add it to the system"
        );
    }
}
