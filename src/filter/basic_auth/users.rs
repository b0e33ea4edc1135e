//! A file of users in the format of `htpasswd -B`: a name, a colon, and the hash of the password, bcrypt or argon2.

use std::collections::HashMap;

use argon2::password_hash::{PasswordHash, PasswordVerifier};
use argon2::{Algorithm, Argon2, Params, Version};

use crate::filter::listed::lines;

/// A higher cost (about two seconds) would let any client keep the threads busy.
const BCRYPT_COST_MAX: u32 = 15;
/// The memory limit of an argon2 hash, in KiB.
const ARGON2_MEMORY_MAX: u32 = 256 * 1024;
/// The limit on its passes over the memory.
const ARGON2_PASSES_MAX: u32 = 32;

/// The hash of a password.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Stored {
    /// `$2b$…`
    Bcrypt(Box<str>),
    /// `$argon2id$…`
    Argon2(Box<str>),
}

impl Stored {
    /// Parses a hash of the file.
    pub fn parse(hash: &str) -> Result<Stored, String> {
        let help = "make it anew by `htpasswd -B`";
        if ["$2a$", "$2b$", "$2y$", "$2x$"].iter().any(|kind| hash.starts_with(kind)) {
            let parts: bcrypt::HashParts = hash.parse().map_err(|_| "is not a complete bcrypt hash".to_owned())?;
            let cost = parts.get_cost();
            if !(4..=BCRYPT_COST_MAX).contains(&cost) {
                return Err(format!("is a bcrypt hash of cost {cost}, and it must be 4 to {BCRYPT_COST_MAX}"));
            }
            return Ok(Stored::Bcrypt(hash.into()));
        }
        if hash.starts_with("$argon2") {
            let whole = PasswordHash::new(hash).map_err(|_| "is not a complete argon2 hash".to_owned())?;
            let (params, _) = argon2_of(&whole).ok_or("is not a complete argon2 hash")?;
            if params.m_cost() > ARGON2_MEMORY_MAX || params.t_cost() > ARGON2_PASSES_MAX {
                return Err(format!(
                    "is an argon2 hash of more than {} MiB or {ARGON2_PASSES_MAX} passes",
                    ARGON2_MEMORY_MAX / 1024
                ));
            }
            return Ok(Stored::Argon2(hash.into()));
        }
        Err(if hash.starts_with("$apr1$") || hash.starts_with("$1$") {
            format!("is hashed with MD5, which is easy to crack: {help}")
        } else if hash.starts_with("{SHA}") {
            format!("is hashed with SHA-1, which is easy to crack: {help}")
        } else {
            format!("is neither a bcrypt nor an argon2 hash: {help}")
        })
    }

    /// The hash as in the file.
    pub fn text(&self) -> &str {
        match self {
            Stored::Bcrypt(hash) | Stored::Argon2(hash) => hash,
        }
    }

    /// Whether the password matches. Takes the same time for each result, and compares in constant time.
    pub fn is_of(&self, password: &[u8]) -> bool {
        match self {
            // All four variants differ only in old bugs with bytes above 127.
            Stored::Bcrypt(hash) => bcrypt::verify(password, hash).unwrap_or(false),
            Stored::Argon2(hash) => {
                let Ok(whole) = PasswordHash::new(hash) else { return false };
                let Some((params, (algorithm, version))) = argon2_of(&whole) else { return false };
                Argon2::new(algorithm, version, params).verify_password(password, &whole).is_ok()
            }
        }
    }
}

fn argon2_of(hash: &PasswordHash<'_>) -> Option<(Params, (Algorithm, Version))> {
    let algorithm = Algorithm::try_from(hash.algorithm).ok()?;
    let version = match hash.version {
        None => Version::default(),
        Some(version) => Version::try_from(version).ok()?,
    };
    (hash.hash.is_some() && hash.salt.is_some()).then_some(())?;
    Some((Params::try_from(hash).ok()?, (algorithm, version)))
}

/// Users with the hashes of their passwords.
#[derive(Debug)]
pub struct Users {
    stored: HashMap<Box<str>, Stored>,
    /// The hash for unknown users: an immediate answer would reveal that the user does not exist.
    decoy: Stored,
}

impl Users {
    /// Parses a file.
    ///
    /// # Errors
    /// The mistake and its line.
    pub fn parse(text: &str) -> Result<Users, String> {
        let (mut stored, mut decoy) = (HashMap::new(), None);
        for (number, line) in lines(text) {
            let (user, hash) = line
                .split_once(':')
                .filter(|(user, _)| !user.is_empty())
                .ok_or_else(|| format!("line {number} is not `user:hash`"))?;
            let hash =
                Stored::parse(hash.trim()).map_err(|told| format!("line {number}: the password of `{user}` {told}"))?;
            decoy.get_or_insert_with(|| hash.clone());
            if stored.insert(user.into(), hash).is_some() {
                return Err(format!("line {number}: `{user}` is there twice"));
            }
        }
        // While a file is being written, it may be empty for a moment.
        let decoy = decoy.ok_or("there is no user in it")?;
        Ok(Users { stored, decoy })
    }

    /// The hash of a user, or the hash for unknown users; and whether the user exists.
    pub fn of(&self, user: &str) -> (&Stored, bool) {
        match self.stored.get(user) {
            Some(stored) => (stored, true),
            None => (&self.decoy, false),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// `myPassword`, from the manual of Apache, and `password`, made with the reference implementation of argon2.
    const APACHE: &str = "$2y$05$c4WoMPo3SXsafkva.HHa6uXQZWr7oboPiC2bT/r7q1BB8I2s0BRqC";
    const REFERENCE: &str =
        "$argon2i$v=19$m=512,t=2,p=2$k68VIgJxFkiigMcUXKb8XA$vERffMa2tWzINOy8ioUgZ1UPzu1biH6PLE9+hY4KaNE";

    #[test]
    fn hashes_of_others_are_understood() {
        let apache = Stored::parse(APACHE).unwrap();
        assert!(apache.is_of(b"myPassword") && !apache.is_of(b"mypassword"));
        let own = Stored::parse(&bcrypt::hash("grüße", 4).unwrap()).unwrap();
        assert!(own.is_of("grüße".as_bytes()) && !own.is_of(b"gr") && !own.is_of(b""));
        assert!(Stored::parse("$2a$05$CCCCCCCCCCCCCCCCCCCCC.E5YPO9kmyuRGyh0XouQYb4YMJKvyOeW").unwrap().is_of(b"U*U"));
        let reference = Stored::parse(REFERENCE).unwrap();
        assert!(reference.is_of(b"password") && !reference.is_of(b"Password"));
    }

    #[test]
    fn a_file_of_users_is_read() {
        let users = Users::parse(&format!("# ours\n\nada:{APACHE}\neve:{REFERENCE}\n")).unwrap();
        assert!(users.of("ada").1 && users.of("eve").1 && !users.of("bob").1 && !users.of("").1);
        assert_eq!(users.of("bob").0, users.of("ada").0, "a stranger takes as long");
    }

    #[test]
    fn what_is_wrong_is_told_with_its_line() {
        let told = |text: &str| Users::parse(text).map(drop).unwrap_err();
        assert_eq!(told(""), "there is no user in it");
        assert_eq!(told("# a\nada"), "line 2 is not `user:hash`");
        assert_eq!(told(":x"), "line 1 is not `user:hash`");
        assert!(told("ada:$apr1$x$y").starts_with("line 1: the password of `ada` is hashed with MD5"));
        assert!(told("ada:{SHA}x").contains("SHA-1"));
        assert!(told("ada:secret").contains("is neither a bcrypt nor an argon2 hash"));
        assert!(told("ada:$2y$05$short").contains("is not a complete bcrypt hash"));
        assert!(told(&format!("ada:{}", APACHE.replace("$05$", "$31$"))).contains("of cost 31"));
        assert!(told("ada:$argon2id$v=19$m=65536").contains("is not a complete argon2 hash"));
        let large = REFERENCE.replace("m=512", "m=1048576");
        assert!(told(&format!("ada:{large}")).contains("more than 256 MiB"));
        assert!(told(&format!("ada:{APACHE}\nada:{APACHE}")).contains("line 2: `ada` is there twice"));
    }
}
