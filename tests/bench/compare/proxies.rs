//! The proxies that are compared and the origin behind them: how each is configured to do the same work on one worker.
//!
//! The same work: keep-alive on both sides with connections to spare, `X-Forwarded-For` and `-Proto` added, one log
//! line per request written to a file. Where a default would interrupt the measurement (nginx closes a connection after
//! 1,000 requests), it is lifted; everything else stays at its default. With TLS all show the same certificate.

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

/// A port that was free may be taken by the time a server binds it; then another is tried.
const ATTEMPTS: usize = 4;

/// The arguments with which this program is the origin that counts, for uploads and for a crowd of slow clients.
pub const BULK_ORIGIN: &str = "bulk-origin";
pub const CROWD_ORIGIN: &str = "crowd-origin";

/// The argument with which it is an endpoint that gets into trouble.
pub const MOODY_ORIGIN: &str = "moody-origin";

/// A proxy to compare.
#[derive(Clone, Debug)]
pub struct Proxy {
    /// Its name in the tables.
    pub name: String,
    kind: Kind,
    /// What it shows to clients of TLS, if it speaks that.
    tls: Option<Arc<Identity>>,
}

#[derive(Clone, Debug)]
enum Kind {
    Forebay { binary: PathBuf, routes: usize, keys: Keys },
    Nginx { http: &'static str },
    Haproxy,
}

/// Keys in the configuration of Forebay beyond those that every cell has, as text of YAML.
#[derive(Clone, Copy, Debug, Default)]
pub struct Keys {
    /// Of the section `server`. `{dir}` stands for the directory of the proxy, where all of its files are.
    pub server: Option<&'static str>,
    /// Of the listener.
    pub listener: Option<&'static str>,
    /// Of the route.
    pub route: Option<&'static str>,
    /// Of the upstream, where there are several endpoints.
    pub upstream: Option<&'static str>,
    /// Ten rules that each request is asked, none of which holds.
    pub rules: Option<Rules>,
    /// Whether there is a route that asks for a password, before the one that all requests take.
    pub guarded: bool,
}

/// Where rules are.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Rules {
    /// On filters of the route that all requests take.
    OnFilters,
    /// On routes before it, one each.
    OnRoutes,
}

/// Where a proxy sends its requests.
#[derive(Clone, Copy, Debug)]
pub struct Origins {
    /// All of them, or the rest.
    pub rest: SocketAddr,
    /// Those of slow clients: `/4m` and `/upload`. A fast client's then do not wait behind them at the origin.
    pub bulk: Option<SocketAddr>,
}

/// The proxies that can be chosen on the command line.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Choice {
    Forebay,
    Nginx,
    Haproxy,
}

/// A build of Forebay to compare: `name=path`, or a path alone.
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

    /// nginx that holds uploads in memory up to 2 MiB and need not write them to files.
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

    /// Forebay with so many routes, of which the request takes the last resort.
    pub fn forebay_with_routes(binary: &Path, routes: usize) -> Proxy {
        let kind = Kind::Forebay { binary: binary.to_owned(), routes, keys: Keys::default() };
        Proxy { name: format!("{routes} routes"), kind, tls: None }
    }

    /// The same under another name.
    pub fn named(self, name: &str) -> Proxy {
        Proxy { name: name.to_owned(), ..self }
    }

    /// The same with clients that may be silent for ten minutes, if it is nginx.
    pub fn with_long_idle(mut self) -> Proxy {
        if let Kind::Nginx { http } = &mut self.kind {
            *http = "    keepalive_timeout 600s;\n";
        }
        self
    }

    /// The same with these keys, if it is a Forebay.
    pub fn with_keys(mut self, with: Keys) -> Proxy {
        if let Kind::Forebay { keys, .. } = &mut self.kind {
            *keys = with;
        }
        self
    }

    /// The same, speaking TLS: HTTP/1.1 and HTTP/2, as ALPN decides.
    pub fn with_tls(self, identity: &Arc<Identity>) -> Proxy {
        Proxy { tls: Some(identity.clone()), ..self }
    }

    /// Whether it is a Forebay, of which something is demanded.
    pub fn is_forebay(&self) -> bool {
        matches!(self.kind, Kind::Forebay { .. })
    }

    /// The file to run, and the argument that makes it say its version.
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

    /// Starts it in front of `origins`, as it is run where it is to load its configuration anew: nginx and HAProxy with a
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

    /// Has it load a configuration in which a time is another than before, for the `number`th time.
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
        // Each time from the configuration that it was started with.
        let original = running.dir.path().join("original");
        if number == 1 {
            fs::write(&original, &config)?;
        }
        fs::write(&path, fs::read_to_string(&original)?.replacen(from, &to, 1))?;
        Ok(running.server.signal(signal)?)
    }

    /// Starts it in front of several endpoints, as `several` says.
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

/// A server at work, in a directory of its own that goes when it goes.
pub struct Running {
    /// The process. It stands before the directory, for fields are dropped in order.
    pub server: Server,
    dir: TempDir,
}

impl Running {
    /// Starts the origin: nginx with one worker, small answers from memory and large ones from files.
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

    /// Starts the origin that counts: this program again, as which of the two `role` says.
    pub fn counting_origin(machine: &Machine, role: &str) -> Result<Running> {
        Running::start(role, free_address, false, |address, _| {
            let mut command = machine.origin(std::env::current_exe()?);
            command.args([role, &address.to_string()]);
            Ok(command)
        })
    }

    /// Starts an endpoint that gets into trouble when it is told to, at an address of its own or where one was before.
    pub fn moody_origin(machine: &Machine, at: Option<SocketAddr>) -> Result<Running> {
        let choose = || at.map_or_else(free_address, Ok);
        Running::start(MOODY_ORIGIN, choose, false, |address, _| {
            let mut command = machine.origin(std::env::current_exe()?);
            command.args([MOODY_ORIGIN, &address.to_string()]);
            Ok(command)
        })
    }

    /// `command` is made for an address and a directory, anew for each attempt.
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

    /// What a Forebay counts, as text.
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

/// The configuration's file follows. Errors before it is read go to stderr, not to a file that only root may write.
const NGINX_ARGUMENTS: &[&str] = &["-e", "stderr", "-c"];

/// In the foreground; the file follows.
const HAPROXY_ARGUMENTS: &[&str] = &["-db", "-f"];

/// The same with a master process.
const HAPROXY_MASTER_ARGUMENTS: &[&str] = &["-W", "-db", "-f"];

/// Where a Forebay tells what it counts, in its directory.
const ADMIN_SOCKET: &str = "admin.sock";

/// The users of the guarded route, in its directory, and the path of that route.
const USERS: &str = "users";
pub const GUARDED: &str = "/guarded";

/// What slow clients ask for.
const BULK_PATHS: [&str; 2] = ["/4m", "/upload"];

/// What both nginxes have in common. Without a master process there is one process to measure and to end. Open
/// connections are held to what `ulimit -n` allows anyway.
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

/// What every HAProxy has, and `backends` behind it, the first of which is `app`. The log goes to stdout, which is a
/// file here: it has no other way to one.
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

/// Metrics and phases cannot be turned off, the access log is on. All routes but the last name paths and hosts that no
/// request of ours has: the request comes past them all. All clients have one address, so one address may have
/// everything.
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
