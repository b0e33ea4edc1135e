//! Notifications to the service manager: `Type=notify-reload`, and the watchdog.

use std::os::unix::net::UnixDatagram;
use std::path::Path;

use crate::harness::{DEADLINE, Origin, Setup};
use crate::takeover::ends;

/// A service manager and its socket.
fn listening(setup: &Setup) -> (UnixDatagram, std::path::PathBuf) {
    let path = setup.path("notify.sock");
    let socket = UnixDatagram::bind(&path).expect("a socket");
    socket.set_read_timeout(Some(DEADLINE)).expect("a deadline");
    (socket, path)
}

/// The next notification that is not from the watchdog.
fn told(manager: &UnixDatagram) -> String {
    loop {
        let mut word = [0; 1024];
        let length = manager.recv(&mut word).expect("a word in time");
        let word = String::from_utf8_lossy(&word[..length]).into_owned();
        if word != "WATCHDOG=1" {
            return word;
        }
    }
}

#[test]
fn the_manager_hears_of_the_start_of_reloads_and_of_the_stop() {
    let origin = Origin::named("origin");
    let setup = Setup::before(&origin);
    let (manager, path) = listening(&setup);
    let mut process = setup.spawn_with(&[("NOTIFY_SOCKET", &path)]);
    let ready = told(&manager);
    assert!(ready.starts_with("READY=1\nMAINPID=") && ready.contains("generation 1 "), "{ready}");
    process.signal(libc::SIGHUP);
    let reloading = told(&manager);
    assert!(reloading.starts_with("RELOADING=1\nMONOTONIC_USEC="), "{reloading}");
    assert!(told(&manager).contains("generation 2 "));
    // A refused reload also ends with READY.
    std::fs::write(setup.path("forebay.yaml"), "listeners: [").expect("a file");
    process.signal(libc::SIGHUP);
    assert!(told(&manager).starts_with("RELOADING=1"));
    assert!(told(&manager).contains("generation 2 "));
    process.signal(libc::SIGTERM);
    assert!(told(&manager).starts_with("STOPPING=1"));
    assert_eq!(process.ended().code(), Some(0));
}

#[test]
fn the_manager_hears_from_the_old_process_that_a_new_one_is_the_main_one_and_then_from_that_one() {
    let origin = Origin::named("origin");
    let setup = Setup::before(&origin);
    let (manager, path) = listening(&setup);
    let environment = [("NOTIFY_SOCKET", &*path), ("WATCHDOG_USEC", Path::new("400000"))];
    let mut process = setup.spawn_with(&environment);
    assert!(told(&manager).starts_with("READY=1"));
    process.signal(libc::SIGUSR2);
    let handed_over = told(&manager);
    let new = handed_over.strip_prefix("MAINPID=").and_then(|rest| rest.lines().next()?.parse::<i32>().ok());
    let new = new.unwrap_or_else(|| panic!("no MAINPID in {handed_over}"));
    assert_ne!(u64::try_from(new).expect("a number"), process.pid());
    let ready = told(&manager);
    assert!(ready.starts_with(&format!("READY=1\nMAINPID={new}\n")), "{ready}");
    assert_eq!(process.ended().code(), Some(0));
    // The old process sends nothing at its end, and the new one feeds the watchdog instead.
    let mut word = [0; 1024];
    let length = manager.recv(&mut word).expect("a word in time");
    assert_eq!(&word[..length], b"WATCHDOG=1");
    // SAFETY: kill has no memory effects, and the process runs.
    assert_eq!(unsafe { libc::kill(new, libc::SIGTERM) }, 0);
    assert!(told(&manager).starts_with("STOPPING=1"));
    ends(u64::try_from(new).expect("a number"));
}

#[test]
fn the_watchdog_hears_that_the_workers_live() {
    let origin = Origin::named("origin");
    let setup = Setup::before(&origin);
    let (manager, path) = listening(&setup);
    let _process = setup.spawn_with(&[("NOTIFY_SOCKET", &path), ("WATCHDOG_USEC", Path::new("400000"))]);
    let mut words = 0;
    while words < 3 {
        let mut word = [0; 1024];
        let length = manager.recv(&mut word).expect("a word in time");
        words += usize::from(&word[..length] == b"WATCHDOG=1");
    }
}
