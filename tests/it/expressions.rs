//! Expressions end to end: conditions on routes and filters, computed values, and the reports of `check` on invalid
//! ones.

use std::process::Command;

use crate::harness::client::{H2Client, request};
use crate::harness::collector::Collector;
use crate::harness::gateway::Watched;
use crate::harness::secure::Authority;
use crate::harness::tls::{Tls, pair};
use crate::harness::{Gateway, Origin, Setup, ok};

/// An origin that returns the path it received, and a gateway with these filters in front of it.
fn filtered(filters: &str) -> (Origin, Gateway) {
    let origin = Origin::answering(|request| ok(request.target()));
    let gateway = Setup::before(&origin).filters(filters).start();
    (origin, gateway)
}

#[test]
fn a_canary_takes_those_for_whom_its_condition_holds() {
    let [stable, canary] = ["stable", "canary"].map(Origin::named);
    let routes = "{ name: canary, match: { path: { prefix: /shop }, when: 'request.cookies[\"beta\"] == \"1\"' }, upstream: canary }\n\
                  { name: shop, match: { path: { prefix: /shop } }, upstream: app }";
    let gateway = Setup::before(&stable).also("canary", &canary).routes(routes).start();
    let mut client = gateway.client();
    let mut ask = |cookie: &str| client.ask("GET", "/shop/cart", cookie, "").text().to_owned();
    assert_eq!(ask(""), "stable");
    assert_eq!(ask("Cookie: a=b; beta=1\r\n"), "canary");
    assert_eq!(ask("Cookie: beta=0\r\n"), "stable");
    assert_eq!(client.ask("GET", "/", "Cookie: beta=1\r\n", "").status, 404, "only candidates are asked");
}

#[test]
fn a_path_in_disguise_is_the_path_to_a_condition_too() {
    let origin = Origin::named("origin");
    let routes = "{ name: closed, match: { when: 'request.path.startsWith(\"/admin\")' }, filters: [ respond: { status: 403 } ] }\n\
                  { name: all, upstream: app }";
    let gateway = Setup::before(&origin).routes(routes).start();
    let mut client = gateway.client();
    for path in ["/admin", "/%61dmin/x", "/public/../admin", "/./admin"] {
        assert_eq!(client.get(path).status, 403, "{path}");
    }
    assert_eq!(client.get("/public").status, 200);
}

#[test]
fn a_filter_acts_where_its_condition_holds_and_what_it_skips_is_counted() {
    let when =
        "request.headers[\"user-agent\"].matches(\"(?i)bot\") && !cidr(\"10.0.0.0/8\").containsIP(source.address)";
    let (origin, gateway) = filtered(&format!("{{ access: {{ deny: [0.0.0.0/0] }}, when: '{when}' }}"));
    let mut client = gateway.client();
    assert_eq!(client.ask("GET", "/", "User-Agent: SomeBot/1\r\n", "").status, 403);
    assert_eq!(client.ask("GET", "/", "User-Agent: Firefox\r\n", "").status, 200);
    assert_eq!(client.get("/").status, 200);
    assert_eq!(origin.requests().len(), 2);
    gateway.wait_metric("forebay_filter_skipped_total{route=\"all\",filter=\"access\"}", |count| count == 2.0);
}

#[test]
fn names_keep_their_spelling_whether_filters_act_or_are_skipped() {
    let when = |on: &str| format!("'request.headers[\"x-on\"].contains(\"{on}\")'");
    let filters = format!(
        "{{ headers: {{ request: {{ set: {{ X-oNe: b }} }} }}, when: {} }}, \
         {{ headers: {{ response: {{ set: {{ X-tWo: b }} }} }}, when: {} }}",
        when("one"),
        when("two")
    );
    let (origin, gateway) = filtered(&filters);
    let mut client = gateway.client();
    for on in ["none", "one", "two", "one, two"] {
        let answer = client.ask("GET", "/", &format!("x-oN: {on}\r\nX-wHy:\r\n"), "");
        assert_eq!(answer.status, 200);
        let requests = origin.requests();
        let fields = &requests.last().expect("a request").head.fields;
        let has = |fields: &[(String, String)], name: &str| fields.iter().any(|(found, _)| found == name);
        assert!(has(fields, "x-oN") && has(fields, "X-wHy"), "{on}: {fields:?}");
        assert_eq!(has(fields, "X-oNe"), on.contains("one"), "{on}: {fields:?}");
        let told = answer.head.fields.iter().any(|(name, _)| name.eq_ignore_ascii_case("x-two"));
        assert_eq!(told, on.contains("two"), "{on}");
    }
}

#[test]
fn a_request_whose_host_cannot_be_made_is_refused() {
    let filter = "headers: { request: { set: { Host: { cel: 'request.args[\"tenant\"]' } } } }";
    let (origin, gateway) = filtered(filter);
    let mut client = gateway.client();
    assert_eq!(client.get("/?tenant=a.test").status, 200);
    assert_eq!(origin.requests()[0].value("host"), Some("a.test"));
    for path in ["/", "/?tenant=a%20b", "/?tenant=a%0d%0ax:%20y"] {
        let refused = client.get(path);
        assert_eq!(refused.status, 400, "{path}");
        assert!(refused.text().starts_with("400 route.headers: "), "{}", refused.text());
    }
    assert_eq!(origin.requests().len(), 1);
}

#[test]
fn leaving_a_header_out_does_not_get_past_a_rule_that_refuses() {
    let (_origin, gateway) =
        filtered("{ access: { deny: [0.0.0.0/0] }, when: 'request.headers[\"x-token\"] != \"s3cret\"' }");
    let mut client = gateway.client();
    assert_eq!(client.get("/").status, 403);
    assert_eq!(client.ask("GET", "/", "X-Token: wrong\r\n", "").status, 403);
    assert_eq!(client.ask("GET", "/", "X-Token: s3cret\r\nX-Token: s3cret\r\n", "").status, 403, "two are not the one");
    assert_eq!(client.ask("GET", "/", "X-Token: s3cret\r\n", "").status, 200);
}

#[test]
fn no_way_to_say_it_gets_past_a_rule_that_refuses_a_value() {
    let when = |written: &str| format!("{{ access: {{ deny: [0.0.0.0/0, \"::/0\"] }}, when: '{written}' }}");
    let rules = [
        "\"1\" in request.headers.values(\"X-Debug\")",
        "\"admin\" in request.cookies.values(\"role\")",
        "\"1\" in request.args.values(\"debug\")",
        "request.args[\"q\"].lowerAscii().matches(\"union.*select\")",
        "request.path.startsWith(\"/admin\")",
        "request.host == \"closed.test\"",
    ];
    let origin = Origin::answering(|request| ok(request.target()));
    let filters = rules.map(when).join(", ");
    let gateway = Setup::before(&origin).listener("protocols: [http1, h2c]").filters(&filters).start();
    let mut client = gateway.client();
    for (path, fields) in [
        ("/", "X-Debug: 1\r\n"),
        ("/", "x-debug: 0\r\nX-DEBUG: 1\r\n"),
        ("/", "X-Debug: 0 ,\t1\r\n"),
        ("/", "Cookie: role=user; role=admin\r\n"),
        ("/", "Cookie: role=user\r\nCookie: a=b;role=admin\r\n"),
        ("/?debug=0&debug=1", ""),
        ("/?%64ebug=%31", ""),
        ("/?a&debug=1&debug=0", ""),
        ("/?q=UNION%0D%0A+Select", ""),
        ("/%61dmin", ""),
        ("//admin", ""),
        ("/x/..//%2e/admin/x", ""),
    ] {
        assert_eq!(client.ask("GET", path, fields, "").status, 403, "{path} {fields}");
    }
    for host in ["closed.test", "Closed.TEST:80", "closed.test."] {
        let ask = format!("GET / HTTP/1.1\r\nHost: {host}\r\n\r\n");
        client.send(ask);
        assert_eq!(client.response().status, 403, "{host}");
    }
    let crumbs = http::Request::get("http://test/").header("cookie", "role=user").header("cookie", "role=admin");
    let over_http2 = H2Client::connect(gateway.web()).ask(crumbs.body(()).expect("a request"), b"");
    assert_eq!(over_http2.expect("an answer").status, 403);
    assert_eq!(origin.requests().len(), 0);
    let fields = "X-Debug: 10\r\nCookie: role=user\r\n";
    assert_eq!(client.ask("GET", "/open?debug=0&q=select", fields, "").status, 200);
}

#[test]
fn a_limit_on_the_length_holds_for_a_body_that_does_not_say_its_own() {
    let origin = Origin::answering(|request| ok(request.target()));
    let filters = "{ respond: { status: 413 }, when: request.size > 10 }";
    let gateway = Setup::before(&origin).listener("protocols: [http1, h2c]").filters(filters).start();
    let mut client = gateway.client();
    assert_eq!(client.ask("POST", "/", "", "0123456789").status, 200);
    assert_eq!(client.get("/").status, 200);
    assert_eq!(gateway.client().ask("POST", "/", "", "01234567890").status, 413);
    let mut chunked = gateway.client();
    chunked.send("POST / HTTP/1.1\r\nHost: test\r\nTransfer-Encoding: chunked\r\n\r\n1\r\nx\r\n0\r\n\r\n");
    assert_eq!(chunked.response().status, 413);
    let over_http2 = H2Client::connect(gateway.web());
    let ask = |body: &[u8]| {
        let request = http::Request::post("http://test/").body(()).expect("a request");
        over_http2.ask(request, body).expect("an answer").status
    };
    assert_eq!((ask(b""), ask(b"x")), (200, 413));
}

#[test]
fn who_a_client_has_proved_to_be_and_where_it_comes_from_is_known_to_conditions() {
    let (servers, clients) = (Authority::new(), Authority::new());
    let origin = Origin::named("app");
    let asks = format!("client: {{ mode: optional, ca: \"{}\" }}", clients.file().display());
    let tls = format!("tls: {{ certificates: [ {{ {}, {asks} }} ] }}", pair(&servers.issue(&["a.test"])));
    let when = [
        "\"ada.example\" in connection.peer_names && connection.peer_fingerprint.size() == 64",
        "connection.peer_subject.contains(\"CN=ada.test\")",
        "connection.sni == \"a.test\" && connection.tls_version == \"TLSv1.3\" && request.scheme == \"https\"",
        "source.address == \"127.0.0.1\" && source.network == \"127.0.0.1\" && source.port > 0",
    ];
    let route = format!("{{ name: ada, match: {{ when: '{}' }}, upstream: app }}", when.join(" && "));
    let gateway = Setup::before(&origin).listener(&tls).routes(&route).start();
    let to = || Tls::to(gateway.web(), &servers, "a.test");
    let ask =
        "GET / HTTP/1.1\r\nHost: a.test\r\nX-Client-Cert-Names: ada.example\r\nX-Forwarded-For: 127.0.0.1\r\n\r\n";
    assert_eq!(to().connect().unwrap().ask(ask).unwrap().status, 404);
    assert_eq!(to().showing(&clients.issue(&["eve.test"])).connect().unwrap().ask(ask).unwrap().status, 404);
    let ada = clients.issue(&["ada.test", "ada.example"]);
    assert_eq!(to().showing(&ada).connect().unwrap().ask(ask).unwrap().status, 200);
}

#[test]
fn the_address_of_a_client_is_that_behind_trusted_proxies_and_of_no_others() {
    let rule =
        "{ access: { deny: [0.0.0.0/0, \"::/0\"] }, when: '!cidr(\"192.0.2.0/24\").containsIP(source.address)' }";
    let origin = Origin::named("app");
    let forwarded = |trusted: &str, said: &str| {
        let gateway = Setup::before(&origin).filters(rule).more(&format!("trusted_proxies: {trusted}")).start();
        gateway.client().ask("GET", "/", &format!("X-Forwarded-For: {said}\r\n"), "").status
    };
    assert_eq!(forwarded("[127.0.0.1]", "192.0.2.7"), 200);
    assert_eq!(forwarded("[127.0.0.1]", "192.0.2.7, 198.51.100.1"), 403, "the proxy has seen another one");
    assert_eq!(forwarded("[]", "192.0.2.7"), 403);
}

#[test]
fn a_condition_on_the_response_decides_what_is_done_to_it() {
    let origin = Origin::answering(|request| match request.target() {
        "/broken" => crate::harness::origin::response("503 Broken", "", "no"),
        _ => ok("yes"),
    });
    let filters = "{ headers: { response: { set: { Cache-Control: no-store } } }, when: response.code >= 500 }, \
                   { headers: { response: { set: { X-Kind: { cel: 'response.headers[\"content-type\"]' } } } } }";
    let gateway = Setup::before(&origin).filters(filters).start();
    let mut client = gateway.client();
    assert_eq!(client.get("/").value("cache-control"), None);
    assert_eq!(gateway.client().get("/broken").value("cache-control"), Some("no-store"));
}

#[test]
fn a_header_is_made_of_the_request_and_a_forged_one_does_not_stay() {
    let (origin, gateway) = filtered(
        "headers: { request: { set: { X-Tenant: { cel: 'request.host.split(\".\")[0]' }, X-User: { cel: 'request.cookies[\"user\"]' } } } }",
    );
    gateway.client().ask("GET", "/", "X-Tenant: forged\r\nX-User: forged\r\n", "");
    let seen = origin.request();
    assert_eq!((seen.value("x-tenant"), seen.value("x-user")), (Some("test"), None));
}

#[test]
fn a_rate_limit_counts_by_what_an_expression_makes() {
    let (_origin, gateway) = filtered(
        "rate_limit: { key: { cel: 'request.headers[\"x-key\"].orValue(string(source.address))' }, rate: 1/h, burst: 1 }",
    );
    let mut client = gateway.client();
    let mut ask = |fields: &str| client.ask("GET", "/", fields, "").status;
    assert_eq!(
        [ask("X-Key: a\r\n"), ask("X-Key: a\r\n"), ask("X-Key: b\r\n"), ask(""), ask("")],
        [200, 429, 200, 200, 429]
    );
}

#[test]
fn endpoints_are_chosen_by_the_hash_of_what_an_expression_makes() {
    let origins = ["a", "b", "c"].map(Origin::named);
    let addresses: Vec<String> = origins.iter().map(|origin| origin.address().to_string()).collect();
    let balancing = "load_balancing: { policy: maglev, hash_key: { cel: 'request.path.split(\"/\")[1]' } }";
    let gateway = Setup::before_all(&addresses).upstream(balancing).start();
    let mut client = gateway.client();
    for tenant in ["x", "y", "z", "w"] {
        let first = client.get(&format!("/{tenant}/1")).text().to_owned();
        for page in 2..6 {
            assert_eq!(client.get(&format!("/{tenant}/{page}?{page}")).text(), first, "{tenant}");
        }
    }
}

#[test]
fn answers_and_redirects_are_made_of_the_request() {
    let origin = Origin::named("origin");
    let routes = "{ name: hello, match: { path: { exact: /hello } }, filters: [ respond: { body: { cel: '\"Hello, \" + request.args[\"name\"].orValue(\"you\") + \".\"' } } ] }\n\
                  { name: go, match: { path: { exact: /go } }, filters: [ redirect: { to: { cel: 'request.args[\"to\"]' }, hosts: [login.example.com], status: 302 } ] }\n\
                  { name: all, upstream: app }";
    let gateway = Setup::before(&origin).routes(routes).start();
    let mut client = gateway.client();
    assert_eq!(client.get("/hello").text(), "Hello, you.");
    assert_eq!(client.get("/hello?name=Ann%20Lee").text(), "Hello, Ann Lee.");
    assert_eq!(client.get("/go?to=https://login.example.com/x").value("location"), Some("https://login.example.com/x"));
    let elsewhere = client.get("/go?to=https://evil.example/");
    assert_eq!((elsewhere.status, elsewhere.value("location")), (400, None));
}

#[test]
fn further_fields_stand_in_the_access_log_and_on_the_span() {
    let (origin, collector) = (Origin::named("origin"), Collector::start());
    let address = collector.address();
    let fields = "fields: { tenant: { cel: 'request.headers[\"x-tenant\"]' }, outcome: { cel: 'string(response.code / 100) + \"xx\"' }, site: eu }";
    let tracing = format!(
        "tracing: {{ endpoint: \"http://{address}\", interval: 20ms, sample: 100%, attributes: {{ tenant: {{ cel: 'request.headers[\"x-tenant\"]' }} }} }}"
    );
    let gateway = Setup::before(&origin).access_log(fields).observability(&tracing).start();
    gateway.client().ask("GET", "/a", "X-Tenant: sh\"op\r\n", "");
    gateway.client().get("/b");
    let line = gateway.log_line_of("/a");
    assert_eq!((line.text("tenant"), line.text("outcome"), line.text("site")), ("sh\"op", "2xx", "eu"));
    assert_eq!(gateway.log_line_of("/b").text("tenant"), "", "what is empty is left out");
    assert_eq!(collector.exchange("/a")[0].text("tenant"), "sh\"op");
}

#[test]
fn a_client_that_takes_its_time_with_its_header_is_known_as_slow() {
    let (_origin, gateway) =
        filtered("{ respond: { status: 408 }, when: client.phase_age > 0.2 && client.rate < 2000 }");
    let mut quick = gateway.client();
    assert_eq!(quick.get("/").status, 200);
    let mut slow = gateway.client();
    let whole = request("GET", "/", "", "");
    let (first, rest) = whole.split_at(10);
    slow.send(first);
    // This client must pause.
    std::thread::sleep(std::time::Duration::from_millis(300));
    slow.send(rest);
    assert_eq!(slow.response().status, 408);
}

const WRONG: &str = r#"listeners: [ { name: web, address: 127.0.0.1:0 } ]
upstreams:
  app:
    endpoints: [ { address: 127.0.0.1:3000 } ]
    load_balancing: { policy: maglev, hash_key: { cel: 'request.size' } }
routes:
  - name: all
    match: { when: 'request.pth == ""' }
    filters:
      - access: { deny: [10.0.0.0/8] }
        when: >-
          request.method == "GET" &&
          request.path.startWith("/a")
      - headers: { request: { set: { X-A: { cel: "request.headers[\"x\"] + 1" } } } }
      - access: { deny: [10.0.0.0/8] }
        when: response.code == 500
    upstream: app
  - name: after-a-wrong-one
    match: { when: 'request.hosst == ""' }
    upstream: app
observability:
  access_log: { fields: { a: { cel: 'request.path.matches("(")' } } }
"#;

/// The output of `check` for this file.
fn checked(text: &str) -> String {
    let folder = tempfile::tempdir().expect("a folder");
    std::fs::write(folder.path().join("f.yaml"), text).expect("a file");
    let mut command = Command::new(env!("CARGO_BIN_EXE_forebay"));
    command.args(["check", "-c", "f.yaml"]).current_dir(folder.path()).env("CDN_KEY", "s3cret");
    let output = command.output().expect("it runs");
    String::from_utf8(output.stderr).expect("text")
}

#[test]
fn check_tells_every_wrong_expression_with_its_line_and_column() {
    let first = checked(WRONG);
    assert!(first.contains("error: this is a whole number (int), and text is expected here"), "{first}");
    assert!(first.contains("f.yaml:5:57"), "{first}");
    let said = checked(&WRONG.replace("'request.size'", "'string(request.size)'"));
    for (place, told) in [
        ("f.yaml:8:21", "nothing is called `request.pth`"),
        ("f.yaml:13:24", "there is no function `startWith`"),
        ("f.yaml:14:76", "`+` does not take text (string) and a whole number (int)"),
        ("f.yaml:16:15", "`response.code` comes too early"),
        ("f.yaml:19:21", "nothing is called `request.hosst`"),
        ("f.yaml:22:59", "`(` is not a usable pattern"),
    ] {
        assert!(said.contains(&format!("--> {place}")), "{place} is not in\n{said}");
        assert!(said.contains(told), "{told} is not in\n{said}");
    }
    assert!(said.contains("did you mean `startsWith`?"), "{said}");
    assert!(said.contains("error: 6 errors in f.yaml"), "{said}");
}

/// The YAML blocks in a page of the manual.
fn examples(page: &str) -> Vec<String> {
    let path = format!("{}/conf/manual/{page}", env!("CARGO_MANIFEST_DIR"));
    let page = std::fs::read_to_string(path).expect("a page");
    let blocks = page.split("```yaml\n").skip(1).filter_map(|rest| rest.split("```").next());
    blocks.map(|block| block.lines().map(|line| format!("  {line}\n")).collect()).collect()
}

#[test]
fn every_example_of_the_manual_is_right() {
    let all = ["expressions.md", "programming.md"].map(examples).concat();
    assert!(all.len() >= 6, "{all:?}");
    for example in all {
        let around = match example.trim_start() {
            text if text.starts_with("routes:") => example.replace("\n  ", "\n").replacen("  routes:", "routes:", 1),
            text if text.starts_with("- ") => format!("routes:\n- name: all\n  upstream: app\n  filters:\n{example}"),
            _ => format!("routes:\n- name: all\n  upstream: app\n{example}- {{ name: rest, upstream: next }}\n"),
        };
        let upstreams = "upstreams: { app: { endpoints: [ { address: 127.0.0.1:3000 } ] }, next: { endpoints: [ { address: 127.0.0.1:3001 } ] } }";
        let text = format!("listeners: [ {{ name: web, address: 127.0.0.1:0 }} ]\n{upstreams}\n{around}");
        let said = checked(&text);
        assert!(!said.contains("error"), "{text}\n{said}");
    }
}

#[test]
fn a_condition_that_is_no_text_is_told() {
    let text =
        WRONG.replace("'request.size'", "'string(request.size)'").replace("when: response.code == 500", "when: [a]");
    let said = checked(&text);
    assert!(said.contains("f.yaml:16:15") && said.contains("must be text"), "{said}");
}

#[test]
fn the_network_of_a_client_is_as_large_as_limits_count_it() {
    let origin = Origin::named("app");
    let setup = Setup::before(&origin).filters("respond: { body: { cel: source.network } }");
    let network = |setup: &Setup| setup.start().client().get("/").text().to_owned();
    assert_eq!(network(&setup), "127.0.0.1");
    assert_eq!(network(&setup.more("ipv4_prefix: 16")), "127.0.0.0/16");
}
