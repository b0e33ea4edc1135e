//! A real nginx as the origin: files of every size, all kinds of framing, uploads to disk, HTTP/2 in both
//! directions.

use std::fs;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};

use tempfile::TempDir;

use super::{end, listening};

/// An nginx with one worker and three ports; it is killed on drop.
pub struct Nginx {
    child: Child,
    dir: TempDir,
    address: SocketAddr,
    h2c: SocketAddr,
    h2: u16,
}

impl Nginx {
    /// Starts it with the files `/small`, `/large` (20 MB), `/empty` and `/chunked` (without a length).
    pub fn start() -> Nginx {
        let dir = tempfile::tempdir().expect("a directory");
        lay_files(dir.path());
        let key = rcgen::generate_simple_self_signed(["localhost".to_owned()]).expect("a certificate");
        fs::write(dir.path().join("cert.pem"), key.cert.pem()).expect("its certificate");
        fs::write(dir.path().join("key.pem"), key.signing_key.serialize_pem()).expect("its key");
        let (child, [address, h2c, h2]) = listening("nginx", |ports| {
            fs::write(dir.path().join("nginx.conf"), config(dir.path(), ports)).expect("its configuration");
            let log = fs::File::create(dir.path().join("log")).expect("its log");
            Command::new("/usr/sbin/nginx")
                .arg("-p")
                .arg(dir.path())
                .args(["-c", "nginx.conf", "-e", "stderr"])
                .stdout(Stdio::null())
                .stderr(log)
                .spawn()
                .expect("nginx, which `make test` installs")
        });
        Nginx { child, dir, address, h2c, h2: h2.port() }
    }

    /// Its HTTP/1 address.
    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// Its clear-text HTTP/2 address.
    pub fn h2c(&self) -> SocketAddr {
        self.h2c
    }

    /// Its address for HTTP/2 over TLS, by the name in its certificate.
    pub fn h2(&self) -> String {
        format!("localhost:{}", self.h2)
    }

    /// Its certificate.
    pub fn certificate(&self) -> PathBuf {
        self.dir.path().join("cert.pem")
    }

    /// The bytes of one of its files.
    pub fn file(&self, path: &str) -> Vec<u8> {
        fs::read(self.root().join(path.trim_start_matches('/'))).expect("a file of nginx")
    }

    fn root(&self) -> PathBuf {
        self.dir.path().join("html")
    }
}

impl Drop for Nginx {
    fn drop(&mut self) {
        end(&mut self.child);
    }
}

/// Bytes without short-range repetition, so that errors in order or length are detected.
pub fn noise(length: usize) -> Vec<u8> {
    let mut state = 0x2545_f491_4f6c_dd1d_u64;
    let mut bytes = Vec::with_capacity(length + 8);
    while bytes.len() < length {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        bytes.extend_from_slice(&state.to_le_bytes());
    }
    bytes.truncate(length);
    bytes
}

fn lay_files(dir: &Path) {
    let html = dir.join("html");
    fs::create_dir(&html).expect("a directory");
    fs::create_dir(html.join("put")).expect("a directory");
    for (name, bytes) in [
        ("small", b"a small file\n".to_vec()),
        ("large", noise(20_000_000)),
        ("empty", Vec::new()),
        ("chunked", text()),
    ] {
        fs::write(html.join(name), bytes).expect("a file");
    }
}

/// A text for server-side includes, which nginx sends without a length because it may change in transit.
fn text() -> Vec<u8> {
    (0..20_000).flat_map(|n| format!("line {n}\n").into_bytes()).collect()
}

/// A single process without a master, so that killing it leaves nothing behind. Temporary paths are in its
/// directory.
fn config(dir: &Path, [http, h2c, h2]: [u16; 3]) -> String {
    let dir = dir.display();
    format!(
        "daemon off;
master_process off;
pid nginx.pid;
error_log stderr warn;
events {{ worker_connections 512; }}
http {{
    access_log off;
    default_type application/octet-stream;
    client_max_body_size 0;
    client_body_temp_path {dir}/body;
    proxy_temp_path {dir}/proxy;
    fastcgi_temp_path {dir}/fastcgi;
    uwsgi_temp_path {dir}/uwsgi;
    scgi_temp_path {dir}/scgi;
    keepalive_requests 1000000;
    server {{
        listen 127.0.0.1:{http};
        listen 127.0.0.1:{h2c} http2;
        listen 127.0.0.1:{h2} ssl http2;
        ssl_certificate {dir}/cert.pem;
        ssl_certificate_key {dir}/key.pem;
        root {dir}/html;
        location /put/ {{ dav_methods PUT; }}
        location = /chunked {{ ssi on; ssi_types *; }}
        location = /nothing {{ return 204; }}
        location = /protocol {{ return 200 $server_protocol; }}
    }}
}}
"
    )
}
