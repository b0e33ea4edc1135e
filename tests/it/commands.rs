//! The commands that talk to a running gateway: `reload`, `diff`, `status`, `stop`; and `dump`.

use std::fs;
use std::process::Command;

use crate::harness::{Origin, Process, Setup};

/// Runs a command against the admin endpoint of a program: its exit code, stdout and stderr.
fn asked(process: &Process, arguments: &[&str]) -> (Option<i32>, String, String) {
    let mut command = Command::new(env!("CARGO_BIN_EXE_forebay"));
    let output = command.args(arguments).arg("--admin").arg(process.admin().to_string()).output().expect("the program");
    let text = |bytes| String::from_utf8(bytes).expect("text");
    (output.status.code(), text(output.stdout), text(output.stderr))
}

#[test]
fn a_reload_is_tried_told_and_refused_from_the_command_line() {
    let origin = Origin::named("origin");
    let setup = Setup::before(&origin);
    let mut process = setup.spawn();
    let (code, told, _) = asked(&process, &["status"]);
    assert_eq!(code, Some(0));
    for part in [": ready, ", "generation 1 of", "listener web: 127.0.0.1:", "upstream app: 1 unknown"] {
        assert!(told.contains(part), "{part} is missing in\n{told}");
    }
    assert_eq!(asked(&process, &["diff"]).1, "nothing differs\n");

    setup.clone().also_listener("{ name: more, address: \"127.0.0.1:0\" }").server("threads: 3").write();
    let (code, told, _) = asked(&process, &["diff"]);
    assert_eq!(code, Some(0));
    assert!(told.contains("+ listeners.more: ") && told.contains("(the listener opens)"), "{told}");
    assert!(told.contains("~ server.threads: 1 -> 3  (needs a new process)"), "{told}");
    let (code, told, warned) = asked(&process, &["reload"]);
    assert_eq!(code, Some(0));
    assert!(told.starts_with("generation 2 runs; 2 differ:"), "{told}");
    assert!(warned.contains("needs a new process, unchanged until then: server.threads"), "{warned}");

    fs::write(setup.path("forebay.yaml"), setup.yaml().replace("routes:", "ruotes:")).expect("a file");
    for command in ["diff", "reload"] {
        let (code, _, told) = asked(&process, &[command]);
        assert_eq!(code, Some(78), "{told}");
        assert!(told.contains("did you mean `routes`?") && told.contains("generation 2 stays active"), "{told}");
    }
    // The admin address is found even if the file has other errors.
    let broken = setup.path("broken.yaml");
    let admin = format!("admin: {{ address: \"{}\" }}\nlisteners: 7\n", process.admin());
    fs::write(&broken, admin).expect("a file");
    let mut command = Command::new(env!("CARGO_BIN_EXE_forebay"));
    let output = command.args(["status", "-c"]).arg(&broken).output().expect("the program");
    assert_eq!(output.status.code(), Some(0), "{}", String::from_utf8_lossy(&output.stderr));

    let (code, told, _) = asked(&process, &["stop"]);
    assert_eq!((code, told.as_str()), (Some(0), "stopped\n"));
    assert_eq!(process.ended().code(), Some(0));
    let (code, _, told) = asked(&process, &["status"]);
    assert_eq!(code, Some(1), "{told}");
}

#[test]
fn a_dump_is_a_configuration_without_secrets() {
    let origin = Origin::named("origin");
    let setup = Setup::before(&origin).admin("token: open-sesame-0123456789abcdef");
    setup.write();
    let dump = |file: &std::path::Path| {
        let mut command = Command::new(env!("CARGO_BIN_EXE_forebay"));
        let output = command.args(["dump", "-c"]).arg(file).output().expect("the program");
        assert_eq!(output.status.code(), Some(0), "{}", String::from_utf8_lossy(&output.stderr));
        String::from_utf8(output.stdout).expect("text")
    };
    let first = dump(&setup.path("forebay.yaml"));
    assert!(first.contains("token: <redacted>") && !first.contains("sesame"), "{first}");
    assert!(first.contains("keepalive_pool:"), "defaults are shown, too:\n{first}");
    // With its secret, the output is a configuration with the same meaning.
    let again = setup.path("again.yaml");
    fs::write(&again, first.replace("<redacted>", "open-sesame-0123456789abcdef")).expect("a file");
    assert_eq!(dump(&again), first);
}
