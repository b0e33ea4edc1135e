//! The compared proxies and their origin: how each is configured to do the same work with one worker.
//!
//! The same work: keep-alive on both sides with spare connections, `X-Forwarded-For` and `-Proto` added, one log line
//! per request in a file. A default that would interrupt the measurement is changed (nginx closes a connection after
//! 1,000 requests); all others are kept. With TLS, all have the same certificate.

use std::ffi::{OsStr, OsString};
use std::fs::{self, File};
use std::io::{Read, Write};
use std::net::{Ipv4Addr, SocketAddr, TcpListener};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::str::FromStr;
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, Result};
use clap::ValueEnum;
use tempfile::TempDir;

use crate::machine::Machine;
use crate::process::Server;
use crate::rules::RULES;
use crate::secure::{Identity, NAME};
use crate::several;

/// A free port may be taken before a server binds it; then another one is tried.
const ATTEMPTS: usize = 4;

/// The arguments that make this program the counting origin, for uploads and for slow clients.
pub const BULK_ORIGIN: &str = "bulk-origin";
pub const CROWD_ORIGIN: &str = "crowd-origin";

/// The argument that makes it a failing endpoint.
pub const MOODY_ORIGIN: &str = "moody-origin";

/// A proxy to compare.
#[derive(Clone, Debug)]
pub struct Proxy {
    /// Its name in the tables.
    pub name: String,
    kind: Kind,
    /// Its certificate, if it serves TLS.
    tls: Option<Arc<Identity>>,
}

#[derive(Clone, Debug)]
enum Kind {
    Forebay { binary: PathBuf, routes: usize, keys: Keys },
    Nginx { http: &'static str },
    Haproxy,
}

/// Additional keys in Forebay's configuration, as YAML text.
#[derive(Clone, Copy, Debug, Default)]
pub struct Keys {
    /// Of the section `server`. `{dir}` is replaced by the directory of the proxy, which has all of its files.
    pub server: Option<&'static str>,
    /// Of the listener.
    pub listener: Option<&'static str>,
    /// Of the route.
    pub route: Option<&'static str>,
    /// Of the upstream, if there are several endpoints.
    pub upstream: Option<&'static str>,
    /// Ten rules that each request evaluates, none of which is true.
    pub rules: Option<Rules>,
    /// Whether there is a route with a password, before the one for all requests.
    pub guarded: bool,
}

/// The location of rules.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Rules {
    /// On filters of the route for all requests.
    OnFilters,
    /// On routes before that route, one each.
    OnRoutes,
}

/// The origins of a proxy.
#[derive(Clone, Copy, Debug)]
pub struct Origins {
    /// The origin of all requests, or of the remaining ones.
    pub rest: SocketAddr,
    /// The origin of slow clients: `/4m` and `/upload`. Requests of a fast client then do not wait for them at the
    /// origin.
    pub bulk: Option<SocketAddr>,
}

/// The proxies that can be selected on the command line.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Choice {
    Forebay,
    Nginx,
    Haproxy,
}

/// Another build of Forebay: `name=path`, or only a path.
#[derive(Clone, Debug)]
pub struct Variant {
    name: String,
    binary: PathBuf,
}

impl FromStr for Variant {
    type Err = std::convert::Infallible;

    fn from_str(written: &str) -> Result<Variant, Self::Err> {
        let (name, binary) = written.split_once('=').unwrap_or((written, written));
        Ok(Variant { name: name.to_owned(), binary: binary.into() })
    }
}

impl Proxy {
    /// nginx with one worker, which is its only process.
    pub fn nginx() -> Proxy {
        Proxy { name: "nginx".to_owned(), kind: Kind::Nginx { http: "" }, tls: None }
    }

    /// nginx that keeps uploads up to 2 MiB in memory and writes none to files.
    pub fn nginx_with_memory() -> Proxy {
        let http = "    client_body_buffer_size 2m;\n";
        Proxy { name: "nginx 2m".to_owned(), kind: Kind::Nginx { http }, tls: None }
    }

    /// HAProxy with one thread.
    pub fn haproxy() -> Proxy {
        Proxy { name: "haproxy".to_owned(), kind: Kind::Haproxy, tls: None }
    }

    /// Forebay with one worker.
    pub fn forebay(binary: &Path) -> Proxy {
        let kind = Kind::Forebay { binary: binary.to_owned(), routes: 1, keys: Keys::default() };
        Proxy { name: "forebay".to_owned(), kind, tls: None }
    }

    /// Another build of Forebay.
    pub fn variant(variant: &Variant) -> Proxy {
        Proxy { name: variant.name.clone(), ..Proxy::forebay(&variant.binary) }
    }

    /// Forebay with this number of routes, the last of which matches the request.
    pub fn forebay_with_routes(binary: &Path, routes: usize) -> Proxy {
        let kind = Kind::Forebay { binary: binary.to_owned(), routes, keys: Keys::default() };
        Proxy { name: format!("{routes} routes"), kind, tls: None }
    }

    /// A copy with another name.
    pub fn named(self, name: &str) -> Proxy {
        Proxy { name: name.to_owned(), ..self }
    }

    /// A copy that allows clients to be silent for ten minutes, if it is nginx.
    pub fn with_long_idle(mut self) -> Proxy {
        if let Kind::Nginx { http } = &mut self.kind {
            *http = "    keepalive_timeout 600s;\n";
        }
        self
    }

    /// A copy with these keys, if it is a Forebay.
    pub fn with_keys(mut self, with: Keys) -> Proxy {
        if let Kind::Forebay { keys, .. } = &mut self.kind {
            *keys = with;
        }
        self
    }

    /// A copy that serves TLS: HTTP/1.1 and HTTP/2, as negotiated by ALPN.
    pub fn with_tls(self, identity: &Arc<Identity>) -> Proxy {
        Proxy { tls: Some(identity.clone()), ..self }
    }

    /// Whether it is a Forebay, for which the goals apply.
    pub fn is_forebay(&self) -> bool {
        matches!(self.kind, Kind::Forebay { .. })
    }

    /// The program, and the argument that prints its version.
    pub fn version(&self) -> (&OsStr, &'static str) {
        match &self.kind {
            Kind::Forebay { binary, .. } => (binary.as_os_str(), "version"),
            Kind::Nginx { .. } => ("nginx".as_ref(), "-v"),
            Kind::Haproxy => ("haproxy".as_ref(), "-v"),
        }
    }

    /// Starts it in front of `origins`.
    pub fn start(&self, machine: &Machine, origins: Origins) -> Result<Running> {
        let tls = self.tls.as_deref();
        Running::start(&self.name, free_address, tls.is_some(), |address, dir| {
            let (program, config, arguments) = match &self.kind {
                Kind::Forebay { binary, routes, keys } => {
                    if keys.guarded {
                        fs::write(
                            dir.join(USERS),
                            "ada:$2b$10$NSVZohxgRPqCbGvPPBsZ2e0EQ1alFm/lUQUbDXYeVwo2R5HXDPuly\n",
                        )?;
                    }
                    let config = forebay_config(address, tls, origins, dir, *routes, keys);
                    (binary.clone(), config, ["run", "-c"].as_slice())
                }
                Kind::Nginx { http } => {
                    ("nginx".into(), nginx_config(address, tls, origins, dir, http), NGINX_ARGUMENTS)
                }
                Kind::Haproxy => ("haproxy".into(), haproxy_config(address, tls, origins), HAPROXY_ARGUMENTS),
            };
            let mut command = machine.proxy(program);
            command.args(arguments).arg(written(&config, dir)?);
            Ok(command)
        })
    }

    /// Starts it in front of `origins`, such that its configuration can be reloaded: nginx and HAProxy run with a
    /// master process.
    pub fn start_reloadable(&self, machine: &Machine, origins: Origins) -> Result<Running> {
        let mut running = Running::start(&self.name, free_address, false, |address, dir| {
            let (program, config, arguments) = match &self.kind {
                Kind::Forebay { binary, routes, keys } => {
                    let config = forebay_config(address, None, origins, dir, *routes, keys);
                    (binary.clone(), config, ["run", "-c"].as_slice())
                }
                Kind::Nginx { http } => {
                    let config = nginx_config(address, None, origins, dir, http);
                    ("nginx".into(), config.replace("master_process off;\n", ""), NGINX_ARGUMENTS)
                }
                Kind::Haproxy => ("haproxy".into(), haproxy_config(address, None, origins), HAPROXY_MASTER_ARGUMENTS),
            };
            let mut command = machine.proxy(program);
            command.args(arguments).arg(written(&config, dir)?);
            Ok(command)
        })?;
        if !self.is_forebay() {
            running.server.with_workers();
        }
        Ok(running)
    }

    /// Makes it reload a configuration with a different time, for the `number`th time.
    pub fn reload(&self, running: &Running, number: u32) -> Result<()> {
        let path = running.dir.path().join("config");
        let config = fs::read_to_string(&path)?;
        let seconds = 60 + number;
        let (from, to, signal) = match &self.kind {
            Kind::Forebay { .. } => ("name: all,", format!("name: all, deadline: {seconds}s,"), libc::SIGHUP),
            Kind::Nginx { .. } => {
                ("location / {", format!("location / {{ proxy_send_timeout {seconds}s;"), libc::SIGHUP)
            }
            Kind::Haproxy => ("timeout client 60s", format!("timeout client {seconds}s"), libc::SIGUSR2),
        };
        // Always starts from the initial configuration.
        let original = running.dir.path().join("original");
        if number == 1 {
            fs::write(&original, &config)?;
        }
        fs::write(&path, fs::read_to_string(&original)?.replacen(from, &to, 1))?;
        Ok(running.server.signal(signal)?)
    }

    /// Starts it in front of several endpoints, configured by `several`.
    pub fn start_before(&self, machine: &Machine, endpoints: &[SocketAddr]) -> Result<Running> {
        Running::start(&self.name, free_address, false, |address, dir| {
            let (program, config, arguments) = match &self.kind {
                Kind::Forebay { binary, keys, .. } => {
                    let config = several::forebay_config(address, endpoints, dir, keys.upstream);
                    (binary.clone(), config, ["run", "-c"].as_slice())
                }
                Kind::Nginx { .. } => ("nginx".into(), several::nginx_config(address, endpoints, dir), NGINX_ARGUMENTS),
                Kind::Haproxy => ("haproxy".into(), several::haproxy_config(address, endpoints), HAPROXY_ARGUMENTS),
            };
            let mut command = machine.proxy(program);
            command.args(arguments).arg(written(&config, dir)?);
            Ok(command)
        })
    }
}

/// A running server, in its own directory, which is removed on drop.
pub struct Running {
    /// The process. It is declared before the directory, since fields are dropped in order.
    pub server: Server,
    dir: TempDir,
}

impl Running {
    /// Starts the origin: nginx with one worker, small responses from memory and large ones from files.
    pub fn origin(machine: &Machine) -> Result<Running> {
        Running::start("the origin", free_address, false, |address, dir| {
            for (name, bytes) in [("64k", 64 << 10), ("1m", 1 << 20), ("4m", 4 << 20)] {
                fs::write(dir.join(name), vec![b'x'; bytes])?;
            }
            let mut command = machine.origin("nginx");
            command.args(NGINX_ARGUMENTS).arg(written(&origin_config(address, dir), dir)?);
            Ok(command)
        })
    }

    /// Starts the counting origin: this program with the argument `role`.
    pub fn counting_origin(machine: &Machine, role: &str) -> Result<Running> {
        Running::start(role, free_address, false, |address, _| {
            let mut command = machine.origin(std::env::current_exe()?);
            command.args([role, &address.to_string()]);
            Ok(command)
        })
    }

    /// Starts an endpoint that fails on command, at a new address or at that of an earlier one.
    pub fn moody_origin(machine: &Machine, at: Option<SocketAddr>) -> Result<Running> {
        let choose = || at.map_or_else(free_address, Ok);
        Running::start(MOODY_ORIGIN, choose, false, |address, _| {
            let mut command = machine.origin(std::env::current_exe()?);
            command.args([MOODY_ORIGIN, &address.to_string()]);
            Ok(command)
        })
    }

    /// Starts a server. `command` is created for an address and a directory, again for each attempt.
    fn start(
        name: &str,
        choose: impl Fn() -> Result<SocketAddr>,
        tls: bool,
        command: impl Fn(SocketAddr, &Path) -> Result<Command>,
    ) -> Result<Running> {
        let attempt = || -> Result<Running> {
            let dir = tempfile::tempdir()?;
            let address = choose()?;
            let server = Server::start(command(address, dir.path())?, address, tls, dir.path())?;
            Ok(Running { server, dir })
        };
        let mut outcome = attempt();
        for _ in 1..ATTEMPTS {
            outcome = outcome.or_else(|_| attempt());
        }
        outcome.with_context(|| format!("{name} does not start"))
    }

    /// The metrics of a Forebay, as text.
    pub fn metrics(&self) -> Result<String> {
        let mut stream = UnixStream::connect(self.dir.path().join(ADMIN_SOCKET))?;
        stream.set_read_timeout(Some(Duration::from_secs(10)))?;
        stream.write_all(b"GET /metrics HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n")?;
        let mut text = String::new();
        stream.read_to_string(&mut text)?;
        Ok(text)
    }

    /// Empties its logs, so that a long run does not fill the disk.
    pub fn empty_logs(&self) -> Result<()> {
        for entry in fs::read_dir(self.dir.path())? {
            let path = entry?.path();
            if path.extension().is_some_and(|extension| extension == "log") {
                File::options().write(true).open(path)?.set_len(0)?;
            }
        }
        Ok(())
    }
}

fn free_address() -> Result<SocketAddr> {
    Ok(TcpListener::bind((Ipv4Addr::LOCALHOST, 0))?.local_addr()?)
}

fn written(config: &str, dir: &Path) -> Result<OsString> {
    let path = dir.join("config");
    fs::write(&path, config)?;
    Ok(path.into())
}

/// The file follows. Errors before it is read go to stderr instead of a file that only root may write.
const NGINX_ARGUMENTS: &[&str] = &["-e", "stderr", "-c"];

/// In the foreground; the file follows.
const HAPROXY_ARGUMENTS: &[&str] = &["-db", "-f"];

/// The arguments with a master process.
const HAPROXY_MASTER_ARGUMENTS: &[&str] = &["-W", "-db", "-f"];

/// Forebay's admin socket, in its directory.
const ADMIN_SOCKET: &str = "admin.sock";

/// The users of the route with a password, in its directory, and the path of that route.
const USERS: &str = "users";
pub const GUARDED: &str = "/guarded";

/// The paths for slow clients.
const BULK_PATHS: [&str; 2] = ["/4m", "/upload"];

/// The common part of both nginx configurations. Without a master process there is only one process to measure and to
/// end. `ulimit -n` limits open connections in any case.
pub fn nginx_frame(dir: &Path, http: &str) -> String {
    let dir = dir.display();
    format!(
        "daemon off;
master_process off;
worker_processes 1;
pid {dir}/nginx.pid;
events {{ worker_connections 16384; }}
http {{
    default_type application/octet-stream;
    client_body_temp_path {dir}/body;
    proxy_temp_path {dir}/proxy;
    fastcgi_temp_path {dir}/fastcgi;
    uwsgi_temp_path {dir}/uwsgi;
    scgi_temp_path {dir}/scgi;
    sendfile on;
    tcp_nopush on;
    keepalive_requests 1000000000;
{http}}}
"
    )
}

fn origin_config(address: SocketAddr, dir: &Path) -> String {
    let (root, small) = (dir.display(), "x".repeat(128));
    let http = format!(
        "    access_log off;
    open_file_cache max=16;
    keepalive_timeout 600s;
    server {{
        listen {address} backlog=4096;
        root {root};
        location = /small {{ return 200 {small}; }}
    }}
"
    );
    nginx_frame(dir, &http)
}

fn nginx_config(address: SocketAddr, tls: Option<&Identity>, origins: Origins, dir: &Path, more: &str) -> String {
    let secure = tls.map_or(String::new(), |tls| {
        let (cert, key) = (tls.cert.display(), tls.key.display());
        format!("        ssl_certificate {cert};\n        ssl_certificate_key {key};\n")
    });
    let speaks = if tls.is_some() { " ssl http2" } else { "" };
    let log = dir.join("access.log");
    let upstream = |name: &str, origin: SocketAddr| {
        format!(
            "    upstream {name} {{
        server {origin};
        keepalive 1024;
        keepalive_requests 1000000000;
    }}
"
        )
    };
    let location = |path: &str, upstream: &str| {
        format!(
            "        location {path} {{
            proxy_pass http://{upstream};
            proxy_http_version 1.1;
            proxy_set_header Connection \"\";
            proxy_set_header Host $http_host;
            proxy_set_header X-Forwarded-For $proxy_add_x_forwarded_for;
            proxy_set_header X-Forwarded-Proto $scheme;
        }}
"
        )
    };
    let mut upstreams = upstream("app", origins.rest);
    let mut locations = location("/", "app");
    if let Some(bulk) = origins.bulk {
        upstreams += &upstream("bulk", bulk);
        locations += &BULK_PATHS.map(|path| location(path, "bulk")).concat();
    }
    let http = format!(
        "    access_log {log};
{more}{upstreams}    server {{
        listen {address}{speaks} backlog=4096;
{secure}{locations}    }}
",
        log = log.display()
    );
    nginx_frame(dir, &http)
}

/// The common part of every HAProxy configuration, followed by `backends`, the first of which is `app`. The log goes to
/// stdout, which is a file here, since HAProxy has no other way to write a file.
pub fn haproxy_frame(
    address: SocketAddr,
    tls: Option<&Identity>,
    (connect, answer): (&str, &str),
    choice: &str,
    backends: &str,
) -> String {
    let speaks = tls.map_or(String::new(), |tls| format!(" ssl crt {} alpn h2,http/1.1", tls.both.display()));
    let scheme = if tls.is_some() { "https" } else { "http" };
    format!(
        "global
    nbthread 1
    maxconn 8000
    log stdout format raw local0
defaults
    mode http
    log global
    option httplog
    option forwardfor
    http-reuse always
    timeout connect {connect}
    timeout client 60s
    timeout server {answer}
    timeout http-keep-alive 75s
frontend web
    bind {address}{speaks} backlog 4096
    http-request set-header X-Forwarded-Proto {scheme}
{choice}    default_backend app
{backends}"
    )
}

fn haproxy_config(address: SocketAddr, tls: Option<&Identity>, origins: Origins) -> String {
    let (mut choice, mut backends) = (String::new(), format!("backend app\n    server origin {}\n", origins.rest));
    if let Some(bulk) = origins.bulk {
        choice = format!("    use_backend bulk if {{ path_beg {} }}\n", BULK_PATHS.join(" "));
        backends += &format!("backend bulk\n    server origin {bulk}\n");
    }
    haproxy_frame(address, tls, ("5s", "60s"), &choice, &backends)
}

/// Metrics and phases cannot be turned off; the access log is on. All routes except the last one have paths and hosts
/// that no request has, so each request passes them all. All clients have the same address, so one address may use all
/// resources.
fn forebay_config(
    address: SocketAddr,
    tls: Option<&Identity>,
    origins: Origins,
    dir: &Path,
    routes: usize,
    keys: &Keys,
) -> String {
    let secure = tls.map_or(String::new(), |tls| {
        let (cert, key) = (tls.cert.display(), tls.key.display());
        format!(", tls: {{ certificates: [ {{ cert: \"{cert}\", key: \"{key}\" }} ], default: {NAME} }}")
    });
    let listener = keys.listener.map_or(String::new(), |keys| format!(", {keys}"));
    let others = (1..routes).map(|n| {
        let host = if n % 2 == 0 { format!("hosts: [shop-{n}.example.com], ") } else { String::new() };
        format!("  - {{ name: service-{n}, match: {{ {host}path: {{ prefix: /service-{n} }} }}, upstream: app }}\n")
    });
    let (mut before, mut filters) = (String::new(), String::new());
    for (number, when) in RULES.iter().enumerate() {
        match keys.rules {
            Some(Rules::OnRoutes) => {
                before += &format!("  - {{ name: rule-{number}, match: {{ when: '{when}' }}, upstream: app }}\n");
            }
            Some(Rules::OnFilters) => {
                filters += &format!("{{ headers: {{ request: {{ set: {{ X-A: b }} }} }}, when: '{when}' }}, ");
            }
            None => {}
        }
    }
    if keys.guarded {
        let users = dir.join(USERS);
        before += &format!(
            "  - {{ name: guarded, match: {{ path: {{ prefix: {GUARDED} }} }}, upstream: app, \
             filters: [ basic_auth: {{ users: {{ path: \"{}\" }} }} ] }}\n",
            users.display()
        );
    }
    let server =
        keys.server.map_or(String::new(), |keys| format!(", {}", keys.replace("{dir}", &dir.to_string_lossy())));
    let route = keys.route.map_or(String::new(), |keys| format!(", {keys}"));
    let (mut bulk_upstream, mut bulk_routes) = (String::new(), String::new());
    if let Some(bulk) = origins.bulk {
        bulk_upstream = format!(", bulk: {{ endpoints: [ {{ address: \"{bulk}\" }} ] }}");
        for path in BULK_PATHS {
            let name = path.trim_start_matches('/');
            bulk_routes +=
                &format!("  - {{ name: {name}, match: {{ path: {{ prefix: {path} }} }}, upstream: bulk{route} }}\n");
        }
    }
    format!(
        "server: {{ threads: 1{server} }}
listeners: [ {{ name: web, address: \"{address}\"{secure}{listener} }} ]
upstreams: {{ app: {{ endpoints: [ {{ address: \"{origin}\" }} ] }}{bulk_upstream} }}
admin: {{ address: \"unix:{admin}\" }}
observability: {{ access_log: {{ path: \"{log}\" }} }}
resources: {{ per_client: 100% }}
routes:
{others}{bulk_routes}{before}  - {{ name: all, upstream: app, filters: [ {filters} ]{route} }}
",
        origin = origins.rest,
        admin = dir.join(ADMIN_SOCKET).display(),
        log = dir.join("access.log").display(),
        others = others.collect::<String>()
    )
}
