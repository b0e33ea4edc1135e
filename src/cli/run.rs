//! `forebay run`: runs the gateway from a file, or the demo with its own origin.

use std::io::{Error, ErrorKind};
use std::net::SocketAddr;

use nix::sys::resource::{Resource, getrlimit, setrlimit};

use super::{ConfigFile, DemoAddresses, Failure, logs, print};
use crate::config::Config;
use crate::gateway::inherited::Inherited;
use crate::gateway::privileges::keep_memory_private;
use crate::gateway::takeover::Predecessor;
use crate::gateway::{Builder, Gateway, StartError};
use crate::origin::Origin;

/// Runs the gateway until a signal stops it.
pub fn run(builder: Builder, file: ConfigFile, watch: bool) -> Result<(), Failure> {
    let (builder, predecessor) = inheriting(builder)?;
    logs::start()?;
    telling(predecessor, || started(builder, file, watch))?.run();
    Ok(())
}

fn started(builder: Builder, file: ConfigFile, watch: bool) -> Result<Gateway, Failure> {
    let (path, config) = file.load(&builder)?;
    // A reload must read the same file, even if the working directory changes.
    let file = std::path::absolute(&path).unwrap_or_else(|_| path.clone());
    let builder = builder.reloading(&file);
    let builder = if watch { builder.watching() } else { builder };
    let gateway = ready(builder, config)?;
    let open_files = getrlimit(Resource::RLIMIT_NOFILE).map_or(0, |(soft, _)| soft);
    tracing::info!(config = %path.display(), version = env!("CARGO_PKG_VERSION"), open_files, "forebay starts");
    Ok(gateway)
}

/// Takes over the sockets that a service manager or a predecessor process opened for this one. Must run before
/// anything else opens files or starts threads.
pub fn inheriting(builder: Builder) -> Result<(Builder, Option<Predecessor>), Failure> {
    let Some(predecessor) = Predecessor::of_environment().map_err(Failure::Runtime)? else {
        let inherited = Inherited::of_service_manager().map_err(Failure::Runtime)?;
        return Ok((builder.inheriting(inherited), None));
    };
    let inherited = Inherited::default();
    predecessor.pass_to(&inherited).map_err(Failure::Runtime)?;
    Ok((builder.inheriting(inherited).replacing(predecessor.clone()), Some(predecessor)))
}

/// Starts a gateway. If that fails, reports the reason to the predecessor process.
pub fn telling<T>(predecessor: Option<Predecessor>, start: impl FnOnce() -> Result<T, Failure>) -> Result<T, Failure> {
    start().inspect_err(|failure| {
        if let Some(predecessor) = predecessor {
            let (report, code) = failure.text(false);
            predecessor.refuse(code == super::EXIT_CONFIG, &report);
        }
    })
}

/// Prepares the process and builds the gateway.
pub fn ready(builder: Builder, config: Config) -> Result<Gateway, Failure> {
    if config.admin.tls.is_some() || config.listeners.iter().any(|listener| listener.tls.is_some()) {
        keep_memory_private();
    }
    // Before the build, because limits on open connections and files depend on it.
    raise_open_files();
    builder.build(config).map_err(failure)
}

/// Runs the gateway in front of a test origin on a free port, and prints what to try.
pub fn demo(builder: Builder, addresses: &DemoAddresses) -> Result<(), Failure> {
    let (builder, predecessor) = inheriting(builder)?;
    logs::start()?;
    let (gateway, _origin) = telling(predecessor, || demonstrating(builder, addresses))?;
    gateway.run();
    Ok(())
}

/// The origin runs until it is dropped.
fn demonstrating(builder: Builder, addresses: &DemoAddresses) -> Result<(Gateway, impl Sized), Failure> {
    let origin = Origin::bind("127.0.0.1:0").and_then(Origin::spawn).map_err(Failure::io("start the test origin"))?;
    let config = builder.parse("demo", &demo_config(addresses, origin.address())).map_err(Failure::Report)?;
    raise_open_files();
    let gateway = builder.build(config).map_err(|error| match error {
        StartError::Listen { address, source, .. } => {
            let option = if address == addresses.admin.to_string() { "--admin" } else { "--listen" };
            Failure::Runtime(format!("{}; choose another with {option} ADDRESS", cannot_listen(&address, &source)))
        }
        other => failure(other),
    })?;
    print(&demo_text(&gateway, addresses, origin.address()))?;
    Ok((gateway, origin))
}

fn demo_config(addresses: &DemoAddresses, origin: SocketAddr) -> String {
    format!(
        "listeners: [ {{ name: demo, address: '{}' }} ]\n\
         upstreams: {{ origin: {{ endpoints: [ {{ address: '{origin}' }} ] }} }}\n\
         routes: [ {{ name: all, upstream: origin }} ]\n\
         admin: {{ address: '{}' }}\n",
        addresses.listen, addresses.admin
    )
}

fn demo_text(gateway: &Gateway, addresses: &DemoAddresses, origin: SocketAddr) -> String {
    let web = gateway.address("demo").unwrap_or(addresses.listen);
    let admin = gateway.admin_address().unwrap_or(addresses.admin);
    format!(
        "\
Forebay is running:

  gateway  http://{web}   what you talk to
  admin    http://{admin}   the status page, for a browser; /metrics, /status and more
  origin   http://{origin}   the built-in test origin behind the gateway; / lists what it can do

Try in another terminal:

  curl -i http://{web}/headers
  curl -N http://{web}/drip/10/300ms
  curl -s http://{admin}/metrics | grep forebay_phase_seconds_sum

The access log follows, a line for each exchange with the milliseconds of each phase. Ctrl-C stops it all.
"
    )
}

/// Raises the soft limit of open files to the hard one, as Go and HAProxy do. The usual soft limit of 1,024 exists
/// for programs that use `select`; here it would mean 500 clients. If it cannot be raised, the gateway is sized for
/// the limit.
fn raise_open_files() {
    if let Ok((soft, hard)) = getrlimit(Resource::RLIMIT_NOFILE)
        && soft < hard
    {
        let _ = setrlimit(Resource::RLIMIT_NOFILE, hard, hard);
    }
}

pub fn failure(error: StartError) -> Failure {
    match error {
        StartError::Build(report) => Failure::Report(report),
        StartError::Listen { listener, address, source } => {
            Failure::Runtime(cannot_listen(&format!("{address} (listener {listener})"), &source))
        }
    }
}

/// The error for an address that cannot be listened on, with advice. `place` may contain a remark behind the
/// address.
pub fn cannot_listen(place: &str, error: &Error) -> String {
    let help = match error.kind() {
        ErrorKind::PermissionDenied if place.starts_with("unix:") => "; the directory must be writable for this user",
        ErrorKind::PermissionDenied => "; ports under 1024 need CAP_NET_BIND_SERVICE",
        ErrorKind::AddrInUse => "; another process listens there",
        ErrorKind::AlreadyExists => "; a file that is not a socket has this name, and is not removed",
        ErrorKind::AddrNotAvailable => "; no interface of this machine has it",
        _ => "",
    };
    format!("cannot listen on {place}: {}{help}", super::plain(error))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn refused(place: &str, code: i32) -> String {
        cannot_listen(place, &Error::from_raw_os_error(code))
    }

    #[test]
    fn an_address_that_cannot_be_had_is_told_with_what_would_help() {
        assert_eq!(
            refused("0.0.0.0:80 (listener web)", libc::EACCES),
            "cannot listen on 0.0.0.0:80 (listener web): permission denied; ports under 1024 need CAP_NET_BIND_SERVICE"
        );
        assert_eq!(
            refused("127.0.0.1:8080", libc::EADDRINUSE),
            "cannot listen on 127.0.0.1:8080: address already in use; another process listens there"
        );
        assert_eq!(
            cannot_listen("unix:/run/forebay.sock", &ErrorKind::AlreadyExists.into()),
            "cannot listen on unix:/run/forebay.sock: entity already exists; a file that is not a socket has this name, and is not removed"
        );
        assert_eq!(
            refused("unix:/run/forebay.sock", libc::EACCES),
            "cannot listen on unix:/run/forebay.sock: permission denied; the directory must be writable for this user"
        );
    }
}
