//! A real ACME server: Debian's `pebble`, with a DNS server and gates for its validation connections.
//!
//! Pebble validates at two ports that are fixed at its start. A gate is such a port. It forwards connections to a
//! gateway's listener once the story sets one, and holds them until then.

use std::fs;
use std::io::{self, BufRead, BufReader, Write};
use std::net::{Shutdown, SocketAddr, TcpListener, TcpStream};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::{Arc, Condvar, Mutex};
use std::thread;
use std::time::{Duration, SystemTime};

use pingora::tls::ssl::{SslAcceptor, SslFiletype, SslMethod};
use tempfile::TempDir;

use super::dnsmasq::Dnsmasq;
use super::secure::Authority;
use super::{DEADLINE, end, eventually, listening, listens};

/// An ACME server; it is killed on drop.
pub struct Pebble {
    child: Option<Child>,
    address: SocketAddr,
    dir: TempDir,
    /// Signs the certificate of the directory.
    authority: Authority,
    dns: Dnsmasq,
    http: Gate,
    tls: Gate,
    advisor: Option<Advisor>,
}

/// A proxy in front of pebble's directory that adds renewal information (RFC 9773), which pebble lacks.
struct Advisor {
    address: SocketAddr,
    asked: Arc<Mutex<Vec<String>>>,
}

/// Settings of an ACME server.
#[derive(Default)]
pub struct Rules {
    /// Names that it refuses.
    pub blocked: &'static [&'static str],
    /// External account binding: the identifier, and the key in base64url.
    pub binding: Option<(&'static str, &'static str)>,
}

/// A port that forwards to a listener.
struct Gate {
    address: SocketAddr,
    target: Arc<(Mutex<Option<SocketAddr>>, Condvar)>,
}

impl Pebble {
    /// A server that resolves these names to the gates.
    pub fn knowing(names: &[&str]) -> Pebble {
        Pebble::with(names, &Rules::default())
    }

    /// The same with these settings.
    pub fn with(names: &[&str], rules: &Rules) -> Pebble {
        let hosts: String = names.iter().map(|name| format!("127.0.0.1 {name}\n")).collect();
        let (dir, authority, dns) =
            (tempfile::tempdir().expect("a directory"), Authority::new(), Dnsmasq::knowing(&hosts));
        let (http, tls) = (Gate::open(), Gate::open());
        let own = authority.issue(&["localhost", "127.0.0.1"]);
        let (child, [address, management]) = listening("pebble", |[port, management]| {
            let binding =
                rules.binding.map(|(kid, key)| format!(r#", "externalAccountMACKeys": {{ "{kid}": "{key}" }}"#));
            let config = format!(
                r#"{{ "pebble": {{ "listenAddress": "127.0.0.1:{port}", "managementListenAddress": "127.0.0.1:{management}",
                "certificate": "{}", "privateKey": "{}", "httpPort": {}, "tlsPort": {}, "ocspResponderURL": "",
                "domainBlocklist": {:?}, "externalAccountBindingRequired": {}{} }} }}"#,
                own.certificate.display(),
                own.key.display(),
                http.address.port(),
                tls.address.port(),
                rules.blocked,
                rules.binding.is_some(),
                binding.unwrap_or_default(),
            );
            fs::write(dir.path().join("pebble.json"), config).expect("its configuration");
            spawn(dir.path(), &dns)
        });
        let pebble = Pebble { child: Some(child), address, dir, authority, dns, http, tls, advisor: None };
        fs::write(pebble.dir.path().join("management"), management.port().to_string()).expect("a file");
        pebble.fetch_root();
        pebble
    }

    /// Says that the first certificate must be renewed at once, and all others in a hundred days.
    pub fn advising(mut self) -> Pebble {
        let curl = Command::new("curl").arg("-sf").arg("--cacert").arg(self.ca()).arg(self.directory()).output();
        let directory = String::from_utf8(curl.expect("curl, which `make test` installs").stdout).expect("a text");
        self.advisor = Some(Advisor::start(&directory, &self.authority));
        self
    }

    /// The identifiers of certificates whose renewal information was requested.
    pub fn asked_about(&self) -> Vec<String> {
        let asked = self.advisor.iter().flat_map(|advisor| advisor.asked.lock().unwrap().clone());
        asked.collect()
    }

    /// The URL of its directory.
    pub fn directory(&self) -> String {
        let address = self.advisor.as_ref().map_or(self.address, |advisor| advisor.address);
        format!("https://localhost:{}/dir", address.port())
    }

    /// The file of the CA for the directory's certificate.
    pub fn ca(&self) -> PathBuf {
        self.authority.file()
    }

    /// The file of the root certificate of all issued certificates.
    pub fn root(&self) -> PathBuf {
        self.dir.path().join("root.pem")
    }

    /// Connects the gates to these listeners.
    pub fn validates(&self, http: SocketAddr, tls: SocketAddr) {
        self.http.leads_to(http);
        self.tls.leads_to(tls);
    }

    /// Number of requests received.
    pub fn requests(&self) -> usize {
        self.log().matches("calling handler()").count()
    }

    /// Its log.
    fn log(&self) -> String {
        fs::read_to_string(self.dir.path().join("log")).expect("its log")
    }

    /// Ends it.
    pub fn kill(&mut self) {
        if let Some(mut child) = self.child.take() {
            end(&mut child);
        }
    }

    /// Starts it again at the same address. It has lost all state, including its root.
    pub fn start_again(&mut self) {
        let mut child = spawn(self.dir.path(), &self.dns);
        eventually("pebble to listen again", || {
            if child.try_wait().expect("the state of the child").is_some() {
                child = spawn(self.dir.path(), &self.dns);
            }
            listens(child.id(), self.address.port()).then_some(())
        });
        self.child = Some(child);
        self.fetch_root();
    }

    fn fetch_root(&self) {
        let management = fs::read_to_string(self.dir.path().join("management")).expect("a port");
        eventually("the root of pebble", || {
            let url = format!("https://localhost:{management}/roots/0");
            let mut curl = Command::new("curl");
            curl.args(["-sf", "-o"]).arg(self.root()).arg("--cacert").arg(self.ca()).arg(url);
            curl.status().expect("curl, which `make test` installs").success().then_some(())
        });
    }
}

impl Drop for Pebble {
    fn drop(&mut self) {
        self.kill();
    }
}

fn spawn(dir: &Path, dns: &Dnsmasq) -> Child {
    let log = fs::File::create(dir.join("log")).expect("its log");
    Command::new("pebble")
        .arg("-config")
        .arg(dir.join("pebble.json"))
        .args(["-strict", "-dnsserver", &dns.address().to_string()])
        // Validates at once, and never reuses an earlier validation.
        .env("PEBBLE_VA_NOSLEEP", "1")
        .env("PEBBLE_AUTHZREUSE", "0")
        .stdout(log.try_clone().expect("its log"))
        .stderr(log)
        .stdin(Stdio::null())
        .spawn()
        .expect("pebble, which `make test` installs")
}

impl Advisor {
    fn start(directory: &str, authority: &Authority) -> Advisor {
        let listener = TcpListener::bind("127.0.0.1:0").expect("a loopback port");
        let address = listener.local_addr().expect("its address");
        let mut directory: serde_json::Value = serde_json::from_str(directory).expect("a directory");
        directory["renewalInfo"] = format!("https://localhost:{}/renewal", address.port()).into();
        let own = authority.issue(&["localhost"]);
        let mut acceptor = SslAcceptor::mozilla_intermediate_v5(SslMethod::tls()).expect("TLS");
        acceptor.set_certificate_chain_file(&own.certificate).expect("a certificate");
        acceptor.set_private_key_file(&own.key, SslFiletype::PEM).expect("a key");
        let (acceptor, asked) = (acceptor.build(), Arc::<Mutex<Vec<String>>>::default());
        let told = asked.clone();
        thread::spawn(move || {
            for client in listener.incoming().flatten() {
                let Ok(mut stream) = acceptor.accept(client) else { continue };
                let mut line = String::new();
                let _ = BufReader::new(&mut stream).read_line(&mut line);
                let path = line.split(' ').nth(1).unwrap_or_default();
                let body = match path.strip_prefix("/renewal/") {
                    Some(certificate) => window(certificate, &mut told.lock().unwrap()),
                    None => directory.to_string(),
                };
                let head =
                    "HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nRetry-After: 21600\r\nConnection: close";
                let _ = write!(stream, "{head}\r\nContent-Length: {}\r\n\r\n{body}", body.len());
                let _ = stream.shutdown();
            }
        });
        Advisor { address, asked }
    }
}

/// The renewal window of this certificate.
fn window(certificate: &str, asked: &mut Vec<String>) -> String {
    const DAY: Duration = Duration::from_secs(86_400);
    let start = if asked.is_empty() { SystemTime::UNIX_EPOCH } else { SystemTime::now() + 100 * DAY };
    asked.push(certificate.to_owned());
    let [start, end] = [start, start + DAY].map(humantime::format_rfc3339_seconds);
    format!(r#"{{ "suggestedWindow": {{ "start": "{start}", "end": "{end}" }} }}"#)
}

impl Gate {
    fn open() -> Gate {
        let listener = TcpListener::bind("127.0.0.1:0").expect("a loopback port");
        let address = listener.local_addr().expect("its address");
        let target: Arc<(Mutex<Option<SocketAddr>>, Condvar)> = Arc::default();
        let gate = Gate { address, target: target.clone() };
        thread::spawn(move || {
            for client in listener.incoming().flatten() {
                let target = target.clone();
                thread::spawn(move || pass(client, &target));
            }
        });
        gate
    }

    fn leads_to(&self, listener: SocketAddr) {
        *self.target.0.lock().unwrap() = Some(listener);
        self.target.1.notify_all();
    }
}

fn pass(client: TcpStream, (target, told): &(Mutex<Option<SocketAddr>>, Condvar)) {
    let target = target.lock().unwrap();
    let (target, _) = told.wait_timeout_while(target, DEADLINE, |target| target.is_none()).unwrap();
    let Some(listener) = *target else { return };
    drop(target);
    let Ok(server) = TcpStream::connect(listener) else { return };
    let (from, to) = (client.try_clone().expect("a socket"), server.try_clone().expect("a socket"));
    let answers = thread::spawn(move || copy(&server, &client));
    copy(&from, &to);
    let _ = answers.join();
}

fn copy(mut from: &TcpStream, mut to: &TcpStream) {
    let _ = io::copy(&mut from, &mut to);
    let _ = to.shutdown(Shutdown::Write);
}
