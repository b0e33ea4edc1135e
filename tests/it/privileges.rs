//! Privileges: Forebay gives up root once its ports are bound, and keeps its memory out of core dumps.

use crate::harness::secure::Authority;
use crate::harness::tls::{Tls, pair};
use crate::harness::{Origin, Setup};

#[test]
fn it_serves_as_another_user_once_its_ports_are_bound_and_its_keys_are_read() {
    let (authority, origin) = (Authority::new(), Origin::named("app"));
    let tls = format!("tls: {{ certificates: [ {{ {} }} ] }}", pair(&authority.issue(&["a.test"])));
    let setup = Setup::before(&origin).server("threads: 1, user: nobody").listener(&tls);
    // SAFETY: it has no arguments and cannot fail.
    if unsafe { libc::geteuid() } != 0 {
        let builder = setup.builder();
        let config = builder.parse("test.yaml", &setup.yaml()).expect("a configuration");
        let errors = builder.check(&config);
        assert!(errors[0].message.starts_with("only root can become `nobody`"), "{errors:?}");
        return;
    }
    let process = setup.spawn();
    assert_eq!(Tls::to(process.web(), &authority, "a.test").get("/").expect("an answer").0.body, "app");
    let users = process.status("Uid");
    assert!(users.iter().all(|user| *user == users[0] && user != "0"), "{users:?}");
    let groups = process.status("Gid");
    assert!(groups.iter().all(|group| group != "0"), "{groups:?}");
}
