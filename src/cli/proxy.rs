//! `forebay proxy`: a gateway without a file. The options are turned into the text of a configuration, which is
//! read, checked and run like any other; `--print` shows it.

mod throwaway;

use std::fmt;
use std::net::SocketAddr;

use clap::{Args, ValueEnum};

use super::{Failure, print, run};
use crate::config::address::{Address, Target};
use crate::config::units::{Rate, Size, Time};
use crate::config::with_schema;
use crate::config::write::{Map, Node};
use crate::gateway::Builder;

use throwaway::Throwaway;

/// The name shown in errors instead of a file name.
const NAME: &str = "forebay proxy";

/// The arguments of `forebay proxy`.
#[derive(Args)]
#[command(after_help = "\
Examples:
  forebay proxy --to localhost:3000
  forebay proxy --from :8080 --to 10.0.0.1:3000 --to 10.0.0.2:3000 --health /healthz
  forebay proxy --from :8443 --tls site.pem,site.key --to localhost:3000 --limit 20/s
  forebay proxy --from :443 --tls www.example.com --to localhost:3000
  forebay proxy --to localhost:3000 --print > forebay.yaml")]
pub struct Proxy {
    /// Where clients connect: `127.0.0.1:8080`, `:8080` for all addresses of this machine, or `unix:/path`
    #[arg(long, value_name = "ADDRESS", default_value = "127.0.0.1:8080", value_parser = from)]
    from: Address,
    /// A backend: `host:3000`, `:3000` for this machine, `https://host`, `h2c://host:50051` or `unix:/path`;
    /// several backends share the requests
    #[arg(long, value_name = "BACKEND", required = true, value_parser = backend)]
    to: Vec<Backend>,
    /// Serve HTTPS: with CERT,KEY (PEM files), or for NAME with a certificate from Let's Encrypt, or without a
    /// value with a temporary certificate for `localhost`
    #[arg(long, value_name = "CERT,KEY | NAME", num_args = 0..=1, default_missing_value = "", value_parser = certificate)]
    tls: Option<Certificate>,
    /// Requests per client, such as `20/s` or `600/m`; requests above the rate get 429
    #[arg(long, value_name = "RATE")]
    limit: Option<Rate>,
    /// The longest request body, such as `100MiB`; a longer one gets 413
    #[arg(long, value_name = "SIZE")]
    max_body: Option<Size>,
    /// How long a backend may take to respond, such as `30s`; a slower one gives 504
    #[arg(long, value_name = "TIME")]
    deadline: Option<Time>,
    /// A path for health checks, requested every five seconds; backends that fail it get no requests
    #[arg(long, value_name = "PATH", value_parser = path)]
    health: Option<String>,
    /// Send the backend its own name as `Host`, instead of the name that the client used
    #[arg(long)]
    change_host: bool,
    /// The access log: `stdout`, `stderr`, `off` or a file
    #[arg(long, value_name = "WHERE", default_value = "stdout")]
    log: String,
    /// The format of the access log
    #[arg(long, value_name = "FORMAT", value_enum, default_value_t = LogFormat::Json)]
    log_format: LogFormat,
    /// Enable the admin endpoint, with metrics and a status page; without a value at 127.0.0.1:9100
    #[arg(long, value_name = "ADDRESS", num_args = 0..=1, default_missing_value = "127.0.0.1:9100", value_parser = from)]
    admin: Option<Address>,
    /// Print the resulting configuration and exit
    #[arg(long)]
    print: bool,
}

/// A backend and its protocol.
#[derive(Clone, Debug, PartialEq)]
pub struct Backend {
    /// The protocol.
    pub speaks: Speaks,
    /// The address.
    pub address: Address,
}

/// The protocols to backends.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Speaks {
    Http,
    Https,
    H2c,
    H2,
}

#[derive(Clone, Debug, PartialEq)]
enum Certificate {
    Files(String, String),
    Acme(String),
    Throwaway,
}

#[derive(Clone, Copy, ValueEnum)]
enum LogFormat {
    Json,
    Combined,
}

/// Runs the gateway until a signal stops it, or prints its configuration.
pub fn proxy(builder: Builder, asked: &Proxy) -> Result<(), Failure> {
    let (builder, predecessor) = if asked.print { (builder, None) } else { run::inheriting(builder)? };
    // Deleted at the end of this run.
    let made = match asked.tls {
        Some(Certificate::Throwaway) if asked.print => {
            return Err(Failure::Usage(
                "--print has no files to name for --tls: name them with --tls CERT,KEY, or a name with --tls NAME"
                    .into(),
            ));
        }
        Some(Certificate::Throwaway) => Some(Throwaway::make()?),
        _ => None,
    };
    let text = asked.text(made.as_ref()).map_err(Failure::Usage)?;
    if asked.print {
        builder.parse(NAME, &text).map_err(Failure::Report)?;
        return print(text.trim_end());
    }
    super::logs::start()?;
    let start = || {
        let config = builder.parse(NAME, &text).map_err(Failure::Report)?;
        let gateway = run::ready(builder.clone(), config)?;
        print(&asked.told(gateway.address("web"), gateway.admin_address()))?;
        Ok(gateway)
    };
    run::telling(predecessor, start)?.run();
    Ok(())
}

impl Proxy {
    /// The configuration. Errors are usage errors.
    fn text(&self, made: Option<&Throwaway>) -> Result<String, String> {
        let speaks = self.to.first().map_or(Speaks::Http, |first| first.speaks);
        if self.to.iter().any(|backend| backend.speaks != speaks) {
            return Err("all backends need the same scheme".into());
        }
        let mut listener = Map::default().with("name", Node::text("web")).with("address", Node::text(&self.from.0));
        if let Some(certificate) = &self.tls {
            let certificate = match (certificate, made) {
                (Certificate::Files(cert, key), _) => files(cert, key),
                (Certificate::Acme(name), _) => {
                    Map::default().with("acme", Node::text("letsencrypt")).with("names", Node::texts([name]))
                }
                (Certificate::Throwaway, Some(made)) => files(&made.certificate(), &made.key()),
                (Certificate::Throwaway, None) => return Err("there is no certificate for --tls".into()),
            };
            let tls = Map::default().with("certificates", Node::List(vec![Node::Map(certificate)]));
            listener
                .put("tls", Node::Map(if made.is_some() { tls.with("default", Node::text("localhost")) } else { tls }));
        }
        let mut upstream = speaks.map();
        let endpoint = |backend: &Backend| Node::Map(Map::default().with("address", Node::text(&backend.address.0)));
        upstream.put("endpoints", Node::List(self.to.iter().map(endpoint).collect()));
        if let Some(path) = &self.health {
            upstream.at("health_check").at("http").put("path", Node::text(path));
        }
        let mut route = Map::default().with("name", Node::text("all"));
        let mut filters = Vec::new();
        if let Some(rate) = self.limit {
            let limit = Map::default().with("key", Node::text("client_ip")).with("rate", Node::text(rate.to_string()));
            filters.push(Node::Map(Map::default().with("rate_limit", Node::Map(limit))));
        }
        if self.change_host {
            let host = self.host()?;
            let mut filter = Map::default();
            filter.at("headers").at("request").at("set").put("Host", Node::text(host));
            filters.push(Node::Map(filter));
        }
        if !filters.is_empty() {
            route.put("filters", Node::List(filters));
        }
        route.put("upstream", Node::text("app"));
        if let Some(size) = self.max_body {
            route.at("buffering").at("request").put("max_body", Node::text(size.to_string()));
        }
        if let Some(time) = self.deadline {
            route.put("deadline", Node::text(time.to_string()));
        }
        let mut file = Map::default()
            .with("listeners", Node::List(vec![Node::Map(listener)]))
            .with("upstreams", Node::Map(Map::default().with("app", Node::Map(upstream))))
            .with("routes", Node::List(vec![Node::Map(route)]));
        match &self.admin {
            Some(address) => file.at("admin").put("address", Node::text(&address.0)),
            None => file.at("admin").put("enabled", Node::word(false)),
        }
        let log = file.at("observability").at("access_log");
        log.put("path", if self.log == "off" { Node::word("off") } else { Node::text(&self.log) });
        if matches!(self.log_format, LogFormat::Combined) {
            log.put("format", Node::text("combined"));
        }
        Ok(with_schema(&file.file()))
    }

    /// The `Host` value for `--change-host`.
    fn host(&self) -> Result<&str, String> {
        match self.to.as_slice() {
            [Backend { address, .. }] if address.unix_path().is_none() => Ok(&address.0),
            _ => {
                Err("--change-host needs one backend with a name: with several, write a file with a route for each"
                    .into())
            }
        }
    }

    /// The message printed at start.
    fn told(&self, web: Option<SocketAddr>, admin: Option<SocketAddr>) -> String {
        let scheme = if self.tls.is_some() { "https" } else { "http" };
        let from = web.map_or_else(|| self.from.0.clone(), |address| format!("{scheme}://{address}"));
        let to: Vec<String> = self.to.iter().map(|backend| backend.to_string()).collect();
        let mut told = format!("Forebay forwards requests from {from} to {}.", to.join(", "));
        if let Some(admin) = admin {
            told += &format!("\nMetrics and the status page are at http://{admin}/.");
        }
        told + "\nCtrl-C stops it; the same command with --print shows the equivalent file."
    }
}

fn files(cert: &str, key: &str) -> Map {
    Map::default().with("cert", Node::text(cert)).with("key", Node::text(key))
}

impl Speaks {
    const SCHEMES: [(&str, Speaks); 6] = [
        ("http", Speaks::Http),
        ("https", Speaks::Https),
        ("h2c", Speaks::H2c),
        ("grpc", Speaks::H2c),
        ("h2", Speaks::H2),
        ("grpcs", Speaks::H2),
    ];

    /// The keys of the upstream.
    fn map(self) -> Map {
        let map = Map::default();
        match self {
            Speaks::Http => map,
            Speaks::Https => map.with("tls", Node::Map(Map::default())),
            Speaks::H2c => map.with("protocol", Node::text("h2c")),
            Speaks::H2 => map.with("protocol", Node::text("h2")),
        }
    }

    /// The same in flow style; `None` if there are none.
    pub fn keys(self) -> Option<&'static str> {
        match self {
            Speaks::Http => None,
            Speaks::Https => Some("tls: {}                               # over HTTPS"),
            Speaks::H2c => Some("protocol: h2c"),
            Speaks::H2 => Some("protocol: h2"),
        }
    }

    /// The default port.
    fn port(self) -> Option<u16> {
        match self {
            Speaks::Http => Some(80),
            Speaks::Https | Speaks::H2 => Some(443),
            Speaks::H2c => None,
        }
    }
}

impl fmt::Display for Backend {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let scheme = match self.speaks {
            Speaks::Http => "",
            Speaks::Https => "https://",
            Speaks::H2c => "h2c://",
            Speaks::H2 => "h2://",
        };
        write!(f, "{scheme}{}", self.address)
    }
}

/// Parses a listen address; `:8080` means this port on all addresses of this machine.
///
/// # Errors
///
/// What is wrong with the form.
pub fn from(text: &str) -> Result<Address, String> {
    if text.starts_with(':') { format!("0.0.0.0{text}").parse() } else { text.parse() }
}

/// Parses a backend.
///
/// # Errors
///
/// What is wrong with the form.
pub fn backend(text: &str) -> Result<Backend, String> {
    let (scheme, rest) = text.split_once("://").map_or((None, text), |(scheme, rest)| (Some(scheme), rest));
    let speaks = match scheme {
        None => Speaks::Http,
        Some(scheme) => {
            Speaks::SCHEMES.into_iter().find(|(known, _)| *known == scheme).map(|(_, speaks)| speaks).ok_or_else(
                || format!("`{scheme}` is not a backend scheme: write http, https, h2c or h2, or `host:port` alone"),
            )?
        }
    };
    if rest.starts_with("unix:") {
        return Ok(Backend { speaks, address: rest.parse()? });
    }
    let host = rest.strip_suffix('/').filter(|_| scheme.is_some()).unwrap_or(rest);
    if host.contains('/') {
        return Err(format!("`{text}` has a path: name the host alone; a file can change paths (`rewrite`)"));
    }
    let written = if host.starts_with(':') { format!("127.0.0.1{host}") } else { host.to_owned() };
    let has_port = written.rsplit_once(':').is_some_and(|(_, port)| !port.contains(']'));
    let address: Address = match (has_port, scheme.and(speaks.port())) {
        (false, Some(port)) => format!("{written}:{port}").parse()?,
        _ => written.parse()?,
    };
    match address.target()? {
        Target::Tcp(_, 0) => Err("nothing can be reached at port 0".into()),
        _ => Ok(Backend { speaks, address }),
    }
}

fn certificate(text: &str) -> Result<Certificate, String> {
    let is_name =
        |text: &str| text.contains('.') && text.split('.').all(|label| !label.is_empty()) && !text.contains('/');
    match text.split_once(',') {
        Some((cert, key)) if !cert.is_empty() && !key.is_empty() => Ok(Certificate::Files(cert.into(), key.into())),
        Some(_) => Err("write the file of the certificate and that of its key: CERT,KEY".into()),
        None if text.is_empty() => Ok(Certificate::Throwaway),
        None if std::path::Path::new(text).is_file() => Err(format!("`{text}` is a file: write CERT,KEY")),
        None if is_name(text) => Ok(Certificate::Acme(text.to_ascii_lowercase())),
        None => Err(format!("`{text}` is neither CERT,KEY nor the name of a host")),
    }
}

fn path(text: &str) -> Result<String, String> {
    if text.starts_with('/') { Ok(text.to_owned()) } else { Err(format!("`{text}` must begin with `/`")) }
}

#[cfg(test)]
mod tests {
    use clap::Parser;

    use super::*;
    use crate::gateway::Gateway;

    #[derive(Parser)]
    struct Line {
        #[command(flatten)]
        proxy: Proxy,
    }

    fn made(arguments: &str) -> String {
        let line = Line::try_parse_from(["proxy"].into_iter().chain(arguments.split_whitespace()));
        let text =
            line.unwrap_or_else(|error| panic!("{error}")).proxy.text(None).unwrap_or_else(|error| panic!("{error}"));
        Gateway::builder().parse(NAME, &text).unwrap_or_else(|report| panic!("{text}\n{report}"));
        text
    }

    fn wrong(arguments: &str) -> String {
        match Line::try_parse_from(["proxy"].into_iter().chain(arguments.split_whitespace())) {
            Ok(line) => line.proxy.text(None).expect_err("an error"),
            Err(error) => error.to_string(),
        }
    }

    #[test]
    fn every_option_stands_in_the_file() {
        assert_eq!(
            made("--to :3000 --to app.test:3001"),
            "# yaml-language-server: $schema=forebay.schema.json\n\
             listeners: [{ name: web, address: 127.0.0.1:8080 }]\n\
             upstreams: { app: { endpoints: [{ address: 127.0.0.1:3000 }, { address: app.test:3001 }] } }\n\
             routes: [{ name: all, upstream: app }]\nadmin: { enabled: false }\n\
             observability: { access_log: { path: stdout } }\n"
        );
        let all = made(
            "--from :8443 --to https://app.test --tls site.pem,site.key --limit 20/s --max-body 100MiB --deadline 30s \
             --health /healthz --change-host --log /tmp/x.log --log-format combined --admin",
        );
        for part in [
            "address: 0.0.0.0:8443",
            "cert: site.pem, key: site.key",
            "tls: {}",
            "address: app.test:443",
            "rate_limit: { key: client_ip, rate: 20/s }",
            "Host: app.test:443",
            "max_body: 100MiB",
            "deadline: 30s",
            "health_check: { http: { path: /healthz } }",
            "path: /tmp/x.log, format: combined",
            "address: 127.0.0.1:9100",
        ] {
            assert!(all.contains(part), "{part} is missing in\n{all}");
        }
        assert!(
            made("--to h2c://[::1]:50051 --tls www.example.com")
                .contains("{ acme: letsencrypt, names: [www.example.com] }")
        );
        assert!(made("--to unix:/run/app.sock --from unix:/run/web.sock --log off").contains("path: off"));
        assert!(made("--to grpcs://app.test").contains("protocol: h2, endpoints: [{ address: app.test:443 }]"));
    }

    #[test]
    fn wrong_options_are_told_with_what_would_be_right() {
        for (arguments, told) in [
            ("", "--to <BACKEND>"),
            ("--to app", "write `host:port`"),
            ("--to ftp://app", "is not a backend scheme"),
            ("--to http://app/v1", "has a path"),
            ("--to h2c://app", "write `host:port`"),
            ("--to :0", "nothing can be reached at port 0"),
            ("--to :3000 --to https://app.test", "the same scheme"),
            ("--to :3000 --to :3001 --change-host", "--change-host needs one backend"),
            ("--to :3000 --limit 20", "is not a rate"),
            ("--to :3000 --tls a.pem,", "CERT,KEY"),
            ("--to :3000 --tls nonsense", "neither CERT,KEY nor the name of a host"),
            ("--to :3000 --health healthz", "must begin with `/`"),
            ("--to :3000 --from 8080", "is not an address"),
        ] {
            let error = wrong(arguments);
            assert!(error.contains(told), "{arguments}: {error}");
        }
    }
}
