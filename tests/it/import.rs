//! `forebay import`: realistic nginx configurations, and one of them compared with the real nginx.

use std::collections::BTreeMap;
use std::fs;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};

use forebay::import::{self, Fate, Imported};
use tempfile::TempDir;

use crate::harness::origin::response;
use crate::harness::wire::{Request, Response};
use crate::harness::{Client, Gateway, Origin, Setup, end, listening};

const FILES: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/it/import");

fn imported(text: &str) -> Imported {
    import::text("nginx.conf", text, &|_| Err("there is no such file here".to_owned()))
        .unwrap_or_else(|e| panic!("{e:?}"))
}

/// The files in the folder, by name.
fn files() -> Vec<(String, PathBuf)> {
    let entries = fs::read_dir(FILES).expect("files").map(|entry| entry.expect("a file").path());
    let mut files: Vec<_> = entries
        .filter(|path| path.extension().is_some_and(|extension| extension == "conf"))
        .map(|path| (path.file_stem().expect("a name").to_string_lossy().into_owned(), path))
        .collect();
    files.sort();
    files
}

#[test]
fn files_like_those_of_real_life_are_imported_as_they_were_when_someone_read_it() {
    let files = files();
    assert!(files.len() >= 10, "{}", files.len());
    for (name, path) in files {
        let text = fs::read_to_string(&path).expect("a file");
        let Imported { yaml, .. } = imported(&text);
        let report = imported(&text).report();
        let config = forebay::gateway::Gateway::builder().parse("forebay.yaml", &yaml);
        assert!(
            config.is_ok(),
            "{name}:\n{yaml}\n{}",
            config.err().map(|report| report.to_string()).unwrap_or_default()
        );
        let mut settings = insta::Settings::clone_current();
        settings.set_snapshot_path("import");
        settings.set_prepend_module_to_snapshot(false);
        settings.set_omit_expression(true);
        settings.bind(|| insta::assert_snapshot!(name, format!("{yaml}\n{report}")));
    }
}

#[test]
fn every_directive_is_accounted_for_once() {
    for (name, path) in files() {
        let text = fs::read_to_string(&path).expect("a file");
        let imported = imported(&text);
        // A directive that ends with a semicolon, or a block with directives.
        for row in imported.rows.iter().filter(|row| row.fate == Fate::Lost) {
            assert!(!row.why.is_empty(), "{name}: {}", row.line);
        }
        let places: Vec<_> = imported.rows.iter().map(|row| (row.place.line, &row.line)).collect();
        assert!(places.windows(2).all(|two| two[0].0 <= two[1].0), "{name}");
        assert!(imported.rows.iter().all(|row| text.lines().nth(row.place.line - 1).is_some()), "{name}");
    }
}

#[test]
fn a_place_that_was_closed_stays_closed() {
    for (closed, what) in [
        ("auth_basic \"for friends\"; auth_basic_user_file users;", "basic_auth"),
        ("auth_basic \"for friends\";", "deny"),
        ("auth_basic \"for friends\"; auth_basic_user_file users_$host;", "deny"),
        ("auth_request /auth;", "deny"),
        ("auth_jwt realm;", "deny"),
        ("deny all;", "deny"),
        ("internal;", "404"),
        ("allow 10.0.0.0/8; deny all;", "10.0.0.0/8"),
    ] {
        let text =
            format!("http {{ server {{ listen 80; location / {{ {closed} proxy_pass http://127.0.0.1:3000; }} }} }}");
        let yaml = imported(&text).yaml;
        assert!(yaml.contains(what), "{closed}:\n{yaml}");
    }
}

#[test]
fn the_command_writes_a_file_that_checks_and_a_report() {
    let dir = tempfile::tempdir().expect("a directory");
    let run = |arguments: &[&str]| {
        let output = Command::new(env!("CARGO_BIN_EXE_forebay"))
            .args(arguments)
            .current_dir(dir.path())
            .env_remove("FOREBAY_CONFIG")
            .output()
            .expect("the program");
        let text = |bytes: Vec<u8>| String::from_utf8(bytes).expect("text");
        (output.status.code(), text(output.stdout), text(output.stderr))
    };
    fs::create_dir(dir.path().join("conf.d")).expect("a folder");
    let site = "server {\n listen 127.0.0.1:8080;\n gzip on;\n ssi on;\n location / { proxy_pass http://127.0.0.1:3000; }\n}\n";
    fs::write(dir.path().join("conf.d/site.conf"), site).expect("a file");
    fs::write(dir.path().join("nginx.conf"), "events {}\nhttp {\n include conf.d/*.conf;\n}\n").expect("a file");
    let (code, out, report) = run(&["import", "nginx.conf", "--output", "forebay.yaml"]);
    assert_eq!((code, &*out), (Some(0), ""), "{report}");
    assert!(report.contains("conf.d/site.conf:4: ssi on") && report.contains("1 without an equivalent"), "{report}");
    assert_eq!(run(&["check", "-c", "forebay.yaml"]).0, Some(0));
    let (code, _, error) = run(&["import", "nginx.conf", "--output", "forebay.yaml"]);
    assert!(code == Some(1) && error.contains("forebay.yaml exists already"), "{error}");
    let (code, out, error) = run(&["import", "nginx.conf", "--strict"]);
    assert!(
        code == Some(1) && out.contains("listeners:") && error.contains("1 directives have no equivalent"),
        "{error}"
    );
    fs::write(dir.path().join("broken.conf"), "http {\n server {\n").expect("a file");
    let (code, _, error) = run(&["import", "broken.conf"]);
    assert_eq!((code, &*error), (Some(78), "forebay: broken.conf:3: the file ends in the block of line 2\n"));
    let (code, _, error) = run(&["import", "absent.conf"]);
    assert_eq!((code, &*error), (Some(1), "forebay: cannot read absent.conf: no such file or directory\n"));
    fs::write(dir.path().join("empty.conf"), "events {}\n").expect("a file");
    assert_eq!(run(&["import", "empty.conf"]).0, Some(78));
}

#[test]
fn brotli_and_zstd_are_codings_of_one_filter_and_gunzip_undoes_gzip() {
    let filters = |directives: &str| {
        let text = format!(
            "http {{ server {{ listen 80; {directives} location / {{ proxy_pass http://127.0.0.1:3000; }} }} }}"
        );
        let Imported { yaml, rows } = imported(&text);
        let config: serde_yaml::Value = serde_yaml::from_str(&yaml).expect("YAML");
        let lost = rows.iter().filter(|row| row.fate == Fate::Lost).map(|row| row.line.clone()).collect::<Vec<_>>();
        (serde_json::to_value(&config["routes"][0]["filters"]).expect("JSON"), lost, yaml)
    };
    let (all, lost, yaml) = filters(
        "brotli on; brotli_types text/css; brotli_comp_level 11; brotli_min_length 1k; brotli_window 512k;
         gzip on; gzip_types text/css application/json; zstd on; gzip_static on; gunzip on; gunzip_buffers 32 4k;",
    );
    let compress = serde_json::json!({ "codings": ["zstd", "br", "gzip"],
        "types": ["text/html", "text/css", "application/json"], "min_size": "20B",
        "zstd_level": 1, "br_level": 9, "gzip_level": 1 });
    assert_eq!(all[0]["compress"], compress, "{yaml}");
    let last = all.as_array().and_then(|all| all.last()).expect("a filter");
    let decompress = serde_json::json!({ "request": false, "codings": ["gzip"], "unknown": "pass" });
    assert_eq!(last["decompress"], decompress, "{yaml}");
    assert_eq!(last["when"], r#"!request.headers["accept-encoding"].contains("gzip")"#);
    assert!(lost.len() == 1 && lost[0].contains("gzip_static"), "{lost:?}");

    let (all, lost, yaml) = filters("brotli on; brotli_min_length 2k; gzip off; gunzip off;");
    let brotli = serde_json::json!({ "codings": ["br"], "types": ["text/html"], "min_size": "2KiB", "br_level": 6 });
    assert_eq!(all[0]["compress"], brotli, "{yaml}");
    assert!(lost.is_empty() && !yaml.contains("decompress"), "{lost:?}\n{yaml}");
}

#[test]
fn checks_pages_compression_and_substitutions_become_filters() {
    let text = r#"http {
        upstream auth { server 127.0.0.1:9; }
        server {
            listen 80;
            gzip on; gzip_types text/css application/json; gzip_min_length 1k; gzip_comp_level 6; gzip_vary on;
            error_page 500 502 /50x.html;
            error_page 404 =200 /empty.html;
            root /srv/pages;
            location = /50x.html { root /usr/share/nginx/html; }
            location = /check { internal; proxy_pass http://auth/verify; }
            location / {
                auth_request /check;
                auth_request_set $user $upstream_http_x_user;
                proxy_set_header X-Login $user;
                proxy_intercept_errors on;
                sub_filter 'http://a.b' 'https://c';
                sub_filter_once off;
                sub_filter "x(y)" "z";
                proxy_pass http://127.0.0.1:3000;
            }
        }
    }"#;
    let Imported { yaml, rows } = imported(text);
    let config: serde_yaml::Value = serde_yaml::from_str(&yaml).expect("YAML");
    let routes = config["routes"].as_sequence().expect("routes");
    let all = routes.iter().find(|route| route["upstream"].as_str().is_some()).expect("a route with an upstream");
    let filter = |name: &str| {
        let found = all["filters"].as_sequence().expect("filters").iter().find(|one| one.get(name).is_some());
        serde_json::to_value(&found.unwrap_or_else(|| panic!("no {name}:\n{yaml}"))[name]).expect("JSON")
    };
    assert_eq!(
        filter("compress"),
        serde_json::json!({ "codings": ["gzip"], "types": ["text/html", "text/css", "application/json"],
                            "min_size": "1KiB", "gzip_level": 6 })
    );
    let pages = serde_json::json!({ "endpoints": true, "pages": [
        { "on": [500, 502], "html": { "path": "/usr/share/nginx/html/50x.html" } },
        { "on": [404], "status": 200, "html": { "path": "/srv/pages/empty.html" } } ] });
    assert_eq!(filter("error_page"), pages);
    assert_eq!(
        filter("forward_auth"),
        serde_json::json!({ "upstream": "auth", "path": "/verify", "copy": ["x-user"] })
    );
    let body = filter("body");
    let rules = body["response"]["replace"].as_array().expect("rules");
    assert_eq!(rules[0], serde_json::json!({ "pattern": "(?i)http://a\\.b", "with": "https://c" }));
    assert_eq!(rules[1]["pattern"], r"(?i)x\(y\)");
    assert!(yaml.contains("request.headers[\"x-user\"]"), "{yaml}");
    let lost: Vec<_> = rows.iter().filter(|row| row.fate == Fate::Lost && !row.line.starts_with("root")).collect();
    assert!(lost.is_empty(), "{lost:#?}");
    assert!(config["upstreams"].get("auth").is_some(), "{yaml}");
}

/// nginx with a file of the project.
struct Nginx {
    child: Child,
    address: SocketAddr,
    /// The file as nginx reads it.
    text: String,
    _dir: TempDir,
}

impl Nginx {
    fn start(file: &Path, backends: &BTreeMap<&str, SocketAddr>) -> Nginx {
        let dir = tempfile::tempdir().expect("a directory");
        let written = backends.iter().fold(fs::read_to_string(file).expect("a file"), |text, (written, address)| {
            text.replace(written, &address.to_string())
        });
        let mut text = String::new();
        let (child, [address]) = listening("nginx", |[port]| {
            text = written.replace("127.0.0.1:8080", &format!("127.0.0.1:{port}"));
            let temporary: String = ["client_body", "proxy", "fastcgi", "uwsgi", "scgi"]
                .map(|kind| format!("{kind}_temp_path {}/{kind};", dir.path().display()))
                .concat();
            let own = format!(
                "daemon off; master_process off; pid {}/pid; error_log stderr crit;\n{}",
                dir.path().display(),
                text.replacen("http {", &format!("http {{ {temporary}"), 1)
            );
            let file = dir.path().join("nginx.conf");
            fs::write(&file, own).expect("its configuration");
            let log = fs::File::create(dir.path().join("log")).expect("its log");
            Command::new("/usr/sbin/nginx")
                .args(["-e", "stderr", "-c"])
                .arg(file)
                .stdout(Stdio::null())
                .stderr(log)
                .spawn()
                .expect("nginx, which `make test` installs")
        });
        Nginx { child, address, text, _dir: dir }
    }
}

impl Drop for Nginx {
    fn drop(&mut self) {
        end(&mut self.child);
    }
}

/// One request, sent to both proxies.
struct Case {
    from: [u8; 4],
    method: &'static str,
    path: String,
    fields: String,
    body: Vec<u8>,
}

impl Case {
    fn get(host: &str, path: &str) -> Case {
        Case {
            from: [127, 0, 0, 1],
            method: "GET",
            path: path.to_owned(),
            fields: format!("Host: {host}\r\n"),
            body: Vec::new(),
        }
    }

    fn field(mut self, line: &str) -> Case {
        self.fields += &format!("{line}\r\n");
        self
    }

    fn method(self, method: &'static str) -> Case {
        Case { method, ..self }
    }

    fn body(self, length: usize) -> Case {
        Case { body: vec![b'x'; length], ..self }
    }

    fn from(self, from: [u8; 4]) -> Case {
        Case { from, ..self }
    }

    fn told(&self, address: SocketAddr) -> Response {
        let Case { method, path, fields, body, .. } = self;
        let length = if body.is_empty() { String::new() } else { format!("Content-Length: {}\r\n", body.len()) };
        let mut client = Client::from(self.from, address);
        client.send(format!("{method} {path} HTTP/1.1\r\n{fields}{length}Connection: close\r\n\r\n"));
        // A body that is too long is refused before it is read.
        client.try_send(body);
        client.response_to(method)
    }
}

/// A request as seen by the origin, without proxy-specific fields.
fn seen(request: &Request, name: &str) -> Vec<u8> {
    let fields =
        ["host", "cookie", "authorization", "x-real-ip", "x-tier", "x-inside", "x-custom", "x-empty", "content-length"];
    let fields: String = fields.iter().map(|name| format!("{name}={:?} ", request.value(name))).collect();
    let told = format!("{name} {} {} {fields}{}", request.method(), request.target(), request.body.len());
    let headers = "Content-Type: text/x-seen\r\nX-Secret: s\r\nX-Public: p\r\nSet-Cookie: a=b; Path=/\r\n";
    match request.target() {
        target if target.contains("away") => {
            let host = request.value("host").unwrap_or_default();
            response("302 Found", &format!("Location: http://{host}{target}/next\r\n"), told)
        }
        target if target.contains("missing") => response("404 Not Found", headers, told),
        _ => response("200 OK", headers, told),
    }
}

/// The parts of two responses that must be equal; the manual lists the differences.
fn compared(answer: &Response, host: &str) -> String {
    let mut told = format!("{}\n", answer.status);
    for name in
        ["content-type", "x-served-by", "x-api", "x-public", "x-secret", "set-cookie", "cache-control", "location"]
    {
        for value in answer.head.values(name) {
            // nginx adds host and port to a redirect on the same host; Forebay does not.
            let value = match value.strip_prefix(&format!("http://{host}")) {
                Some(rest) if name == "location" => rest.trim_start_matches(|c: char| c == ':' || c.is_ascii_digit()),
                _ => value,
            };
            // nginx's own pages have their own types.
            if name != "content-type" || value == "text/x-seen" || value == "text/plain" {
                told += &format!("{name}: {value}\n");
            }
        }
    }
    let body = answer.text();
    // Their bodies differ, too; Forebay's are a sentence, or empty.
    let own = answer.head.value("content-type").is_none_or(|kind| !["text/x-seen", "text/plain"].contains(&kind));
    if own { told } else { told + body }
}

fn cases() -> Vec<Case> {
    let mut cases = Vec::new();
    let paths = [
        "/",
        "/index.html?a=b&c=%20d",
        "/exact",
        "/exact/",
        "/exacts",
        "/api",
        "/api?x=1",
        "/api/",
        "/api/x?y=1",
        "/api/v2",
        "/api/v2/",
        "/api/v2/z/y",
        "/apis",
        "/static",
        "/static/",
        "/static/a.png",
        "/img/a.PNG",
        "/a.css?x",
        "/api/b.css",
        "/user/12/p/q?r",
        "/user/x/",
        "/prefix",
        "/prefix/x",
        "/prefixed",
        "/private/a",
        "/text",
        "/textual",
        "/gone",
        "/move?x=1",
        "/old/a/b?c=d",
        "/old",
        "/readonly/a",
        "/missing",
        "/api/away",
        "/nested/deep/x",
        "/nested/x.css",
        "/closed",
        "/only",
        "/away",
    ];
    for host in ["www.shop.test", "api.shop.test", "x.y.api.shop.test", "old.test", "unknown.test"] {
        cases.extend(paths.iter().map(|path| Case::get(host, path)));
    }
    let shop = |path: &str| Case::get("www.shop.test", path);
    for method in ["HEAD", "DELETE", "OPTIONS", "PUT", "POST", "PATCH"] {
        for path in ["/", "/api/x", "/readonly/a", "/text", "/static/a"] {
            let body = if ["PUT", "POST", "PATCH"].contains(&method) { 300 } else { 0 };
            cases.push(shop(path).method(method).body(body));
        }
    }
    for length in [1, 5_000, 10_240, 10_241, 60_000] {
        cases.push(shop("/").method("POST").body(length));
        cases.push(shop("/upload").method("POST").body(length));
    }
    for line in [
        "User-Agent: BadBot/1",
        "User-Agent: a scraper",
        "User-Agent: fine",
        "X-Tier: gold",
        "X-Tier: vip-1",
        "X-Tier: tin",
        "Cookie: session=1; theme=dark",
        "Authorization: Basic eDp5",
        "X-Custom: kept",
        "X-Empty: gone",
    ] {
        cases.push(shop("/api/x").field(line));
        cases.push(shop("/").field(line));
    }
    for path in ["/private/a", "/api/x", "/readonly/a"] {
        cases.push(shop(path).from([127, 0, 0, 2]));
    }
    cases.extend((0..5).map(|_| shop("/login")));
    cases
}

#[test]
fn nginx_and_the_import_give_the_same_answers_to_two_hundred_requests() {
    let (app, api) =
        (Origin::answering(|request| seen(request, "app")), Origin::answering(|request| seen(request, "api")));
    let backends = BTreeMap::from([("127.0.0.1:3000", app.address()), ("127.0.0.1:3001", api.address())]);
    let nginx = Nginx::start(&Path::new(FILES).join("shop.conf"), &backends);
    let yaml = imported(&nginx.text).yaml;
    let listens = nginx.address.to_string();
    let gateway: Gateway = Setup::whole(&yaml.replace(&format!("address: {listens}"), "address: 127.0.0.1:0")).start();
    let web = gateway.address(&format!("http-{}", listens.replace(':', "-")));
    let cases = cases();
    assert!(cases.len() >= 200, "{}", cases.len());
    let mut differ = Vec::new();
    for case in &cases {
        let host = case.fields.split_once("Host: ").and_then(|(_, rest)| rest.split_once("\r\n")).expect("a host").0;
        let (theirs, ours) = (compared(&case.told(nginx.address), host), compared(&case.told(web), host));
        if theirs != ours {
            differ.push(format!(
                "{} {} {}\n--- nginx\n{theirs}\n--- Forebay\n{ours}\n",
                case.method, case.path, case.fields
            ));
        }
    }
    assert!(differ.is_empty(), "{} of {} differ:\n{}\n{yaml}", differ.len(), cases.len(), differ.join("\n"));
}
