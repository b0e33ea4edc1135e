//! What expressions mean, what is said of wrong ones, and that none can do harm.

mod interpreter;
mod tokens;

use std::borrow::Cow;
use std::sync::Arc;
use std::time::{Duration, Instant};

use http::{HeaderMap, HeaderName, HeaderValue, Method, Uri, Version};
use pingora::http::RequestHeader;
use proptest::prelude::*;

use super::facts::Response;
use super::names::{FUNCTIONS, VARIABLES};
use super::*;
use crate::error::refusal;
use crate::phase::Phase;

/// A request, and a response to it.
#[derive(Debug)]
struct Story {
    method: Method,
    target: Uri,
    headers: HeaderMap,
    answered: HeaderMap,
    client: Option<&'static str>,
    ended: bool,
    pace: Pace,
    identity: Identity,
}

fn map(fields: &[(&'static str, &str)]) -> HeaderMap {
    let field = |&(name, value): &(&'static str, &str)| {
        (HeaderName::from_static(name), HeaderValue::from_bytes(value.as_bytes()).unwrap())
    };
    let mut map = HeaderMap::new();
    fields.iter().map(field).for_each(|(name, value)| _ = map.append(name, value));
    map
}

impl Default for Story {
    fn default() -> Self {
        let cookies = "sid=s1; beta=1";
        let headers = map(&[
            ("host", "Shop.Example.com:8080"),
            ("x-user", "joe"),
            ("x-many", "a"),
            ("x-many", "b"),
            ("cookie", cookies),
            ("x-request-id", "id7"),
            ("content-length", "12"),
        ]);
        Story {
            method: Method::GET,
            target: Uri::from_static("/api/v1/%61?q=x%2Fy+z&n=5&q=2"),
            headers,
            answered: map(&[("content-type", "text/html"), ("server", "x")]),
            client: Some("192.0.2.7"),
            ended: false,
            pace: Pace { phase: Phase::Header, age: Duration::from_millis(2500), bytes: Some(5000) },
            identity: Identity {
                user: "ada".into(),
                by: "jwt",
                claims: vec![
                    ("realm.roles".into(), vec!["admin".into(), "staff".into()]),
                    ("tenant".into(), vec!["acme".into()]),
                ],
            },
        }
    }
}

impl Story {
    fn asked(&self) -> Asked<'_> {
        let facts = Facts {
            client: self.client.map(|client| client.parse().unwrap()),
            prefix: Prefix::default(),
            port: 4711,
            scheme: "https",
            listener: "web",
            route: "shop",
            path: "/api/v1/a",
            secured: Secured {
                version: "TLSv1.3",
                sni: "shop.example.com",
                subject: "CN=joe",
                names: "joe.example.com,urn:joe%2Csue",
                fingerprint: "ab12",
            },
            ended: self.ended,
            pace: self.pace,
            begun: Instant::now(),
            status: 404,
            identity: Some(&self.identity),
            author: Some(Author::Gateway(&refusal::ROUTE_NO_MATCH)),
            attempt: 1,
        };
        Asked {
            facts,
            method: &self.method,
            target: &self.target,
            version: Version::HTTP_2,
            headers: &self.headers,
            response: Some(Response { code: 404, headers: Some(&self.answered) }),
        }
    }

    fn holds(&self, written: &str) -> bool {
        let condition = Condition::build(written, Moment::Response);
        condition.unwrap_or_else(|mistake| panic!("{written}: {mistake:?}")).holds(&self.asked())
    }
}

fn value(written: &str) -> String {
    let value = Value::build(written, Moment::Response).unwrap_or_else(|mistake| panic!("{written}: {mistake:?}"));
    String::from_utf8_lossy(&value.of(&Story::default().asked())).into_owned()
}

#[track_caller]
fn hold(all: &[&str]) {
    for written in all {
        assert!(Story::default().holds(written), "{written}");
        assert!(!Story::default().holds(&format!("!({written})")), "!({written})");
    }
}

#[test]
fn every_name_of_the_manual_is_known_and_has_its_type() {
    for known in VARIABLES {
        let name = known.name;
        let fit = match known.kind {
            "string" => format!("{name} == \"\" || true"),
            "int" => format!("{name} + 1 != 0 || true"),
            "double" => format!("{name} + 1.0 != 0.0 || true"),
            "bool" => format!("{name} || true"),
            "ip" => format!("{name} == ip(\"::1\") || true"),
            "list" => format!("\"a\" in {name} || {name}[0] != \"\""),
            "map" => format!("\"a\" in {name} || {name}[\"a\"] == \"\""),
            kind => panic!("{name} has the type {kind}"),
        };
        hold(&[&fit]);
    }
}

#[test]
fn every_function_of_the_manual_does_what_its_example_says() {
    for known in FUNCTIONS {
        let call = known.name.split('.').next_back().unwrap();
        assert!(known.example.contains(&format!("{call}(")), "{} shows something else", known.name);
        assert!(known.form.contains(&format!("{call}(")), "{} has another form", known.name);
        hold(&[known.example]);
    }
}

#[test]
fn the_manual_is_made_of_the_code() {
    let path = concat!(env!("CARGO_MANIFEST_DIR"), "/conf/manual/expressions.md");
    let page = std::fs::read_to_string(path).unwrap();
    let (begin, end) = ("<!-- made of src/expression/names.rs: begin -->\n", "<!-- end -->\n");
    let (before, rest) = page.split_once(begin).expect("a place for the tables");
    let (found, after) = rest.split_once(end).expect("an end of the tables");
    let made = names::reference();
    if found != made && std::env::var_os("UPDATE_MANUAL").is_some() {
        std::fs::write(path, format!("{before}{begin}{made}{end}{after}")).unwrap();
        return;
    }
    assert_eq!(found, made, "UPDATE_MANUAL=1 has this test make the tables anew");
}

#[test]
fn who_asks_is_what_a_filter_has_found_out() {
    hold(&[
        r#"auth.user == "ada" && auth.by == "jwt" && jwt.claims.tenant == "acme""#,
        r#"jwt.claims["realm.roles"] == "admin, staff" && "staff" in jwt.claims.values("realm.roles")"#,
        r#""tenant" in jwt.claims && !("sub" in jwt.claims) && jwt.claims.sub.size() == 0"#,
        "request.time > 1700000000",
    ]);
    for (written, name) in [(r#"auth.user == "ada""#, "auth.user"), (r#"jwt.claims.tenant == "a""#, "jwt.claims")] {
        let early = Condition::build(written, Moment::Match).map(drop).unwrap_err().message;
        assert!(early.contains(&format!("`{name}` comes too early")), "{early}");
    }
}

#[test]
fn a_request_is_read_as_routes_see_it() {
    hold(&[
        r#"request.method == "GET""#,
        r#"request.path == "/api/v1/a""#,
        r#"request.target.startsWith("/api/v1/%61?q=")"#,
        r#"request.query == "q=x%2Fy+z&n=5&q=2""#,
        r#"request.host == "shop.example.com""#,
        r#"request.scheme == "https" && request.version == "2" && request.id == "id7""#,
        "request.size == 12",
        r#"source.address == "192.0.2.7" && source.address in ["::1", "192.0.2.7"] && source.port == 4711"#,
        r#"string(source.address) == "192.0.2.7""#,
        r#"connection.tls_version == "TLSv1.3" && connection.sni == "shop.example.com""#,
        r#"connection.listener == "web" && connection.peer_subject == "CN=joe" && route.name == "shop""#,
        r#"connection.peer_fingerprint == "ab12" && connection.peer_names.size() == 2"#,
        r#""joe.example.com" in connection.peer_names && !("sue" in connection.peer_names)"#,
        r#"connection.peer_names[1] == "urn:joe%2Csue" && connection.peer_names[2] == """#,
        r#"source.network == "192.0.2.7""#,
        r#"response.code == 404 && response.headers["Content-Type"] == "text/html""#,
        r#"response.reason == "route.no_match" && response.message.contains("No route")"#,
        r#"request.cookies["beta"] == "1" && request.cookies.sid == "s1""#,
        r#"request.args["q"] == "x/y z, 2" && request.args.n == "5""#,
    ]);
}

#[test]
fn what_is_missing_reads_as_an_empty_text_so_that_leaving_it_out_opens_no_door() {
    hold(&[
        r#"request.headers["x-token"] != "s3cret""#,
        r#"request.headers["x-token"] == "" && request.cookies["x"] == "" && request.args["x"] == """#,
        r#"!("x-token" in request.headers) && !has(request.headers.token) && !has(request.cookies.x)"#,
        r#""x-user" in request.headers && "X-User" in request.headers && "beta" in request.cookies && "n" in request.args"#,
        r#"has(request.headers.host) && has(response.headers.server) && !has(response.headers.age)"#,
        r#"int(request.headers["x-user"]) == 0 && "a.b".split(".")[7] == """#,
        r#"request.headers["x-token"].orValue("none") == "none""#,
    ]);
    let unix = Story { client: None, ..Story::default() };
    assert!(unix.holds(r#"string(source.address) == "" && !cidr("0.0.0.0/0").containsIP(source.address)"#));
    assert!(unix.holds(r#"source.address != "192.0.2.7" && hash(source.address) >= 0"#));
}

#[test]
fn several_values_of_a_header_are_one_so_that_a_second_one_does_not_hide() {
    hold(&[r#"request.headers["x-many"] == "a, b""#, r#""b" in request.headers["x-many"].split(", ")"#]);
}

#[test]
fn each_value_of_a_name_can_be_asked_so_that_none_hides_behind_another() {
    let cookies = [("cookie", "role=user; b=1"), ("cookie", "role=admin")];
    let debug = [("x-debug", "0, 1"), ("x-debug", ""), ("x-debug", "a ,,b")];
    let headers = map(&[cookies.as_slice(), &debug].concat());
    let story = Story { target: Uri::from_static("/?d=0&%64=1&d=%31+1"), headers, ..Story::default() };
    for written in [
        r#""1" in request.args.values("d") && "1 1" in request.args.values("d") && request.args.values("d").size() == 3"#,
        r#"request.args["d"] == "0, 1, 1 1" && !("2" in request.args.values("d"))"#,
        r#""admin" in request.cookies.values("role") && request.cookies["role"] == "user, admin""#,
        r#"request.cookies.values("role")[1] == "admin" && request.cookies.values("role")[2] == """#,
        r#""1" in request.headers.values("X-Debug") && request.headers.values("x-debug").size() == 4"#,
        r#"request.headers.values("x-debug")[2] == "a" && request.headers.values("x-debug")[3] == "b""#,
        r#"!("" in request.headers.values("x-debug")) && request.headers.values("x-none").size() == 0"#,
    ] {
        assert!(story.holds(written), "{written}");
    }
}

#[test]
fn a_body_of_unknown_length_is_longer_than_any_limit() {
    let sized = |version: Version, fields: &[(&'static str, &str)], ended: bool| {
        let story = Story { headers: map(fields), ended, ..Story::default() };
        let asked = Asked { version, ..story.asked() };
        Condition::build("request.size > 1000000", Moment::Request).unwrap().holds(&asked)
    };
    assert!(sized(Version::HTTP_11, &[("transfer-encoding", "chunked")], false));
    assert!(sized(Version::HTTP_2, &[], false), "HTTP/2 needs no header to send a body");
    assert!(sized(Version::HTTP_11, &[("content-length", "99999999999999999999")], false));
    assert!(!sized(Version::HTTP_2, &[], true) && !sized(Version::HTTP_11, &[], false));
    assert!(!sized(Version::HTTP_2, &[("content-length", "12")], false));
}

#[test]
fn all_addresses_of_a_network_of_ipv6_are_one_client() {
    for (client, network) in [
        ("2001:db8:1:2:3:4:5:6", "2001:db8:1:2::/64"),
        ("2001:db8:1:2::", "2001:db8:1:2::/64"),
        ("::ffff:192.0.2.7", "192.0.2.7"),
    ] {
        let story = Story { client: Some(client), ..Story::default() };
        assert!(story.holds(&format!("source.network == \"{network}\"")), "{client}");
    }
    assert!(Story { client: None, ..Story::default() }.holds("source.network == \"\""));
}

#[test]
fn the_network_of_a_client_is_the_one_that_limits_count_by() {
    let (prefix, whole) = (Prefix { v4: 24, v6: 48 }, Prefix { v4: 32, v6: 128 });
    for (prefix, client, network) in [
        (prefix, "192.0.2.7", "192.0.2.0/24"),
        (prefix, "::ffff:192.0.2.7", "192.0.2.0/24"),
        (prefix, "2001:db8:1:2::5", "2001:db8:1::/48"),
        (whole, "192.0.2.7", "192.0.2.7"),
        (whole, "2001:db8:1:2::5", "2001:db8:1:2::5"),
    ] {
        let facts = Facts { client: Some(client.parse().unwrap()), prefix, ..Facts::of("all", "/") };
        let request = RequestHeader::build("GET", b"/", None).unwrap();
        let value = Value::build("source.network", Moment::Match).unwrap();
        assert_eq!(String::from_utf8_lossy(&value.of(&facts.asked(&request))), network, "{client}");
    }
}

#[test]
fn padding_hides_nothing_from_a_replacement_and_a_line_break_nothing_from_a_pattern() {
    let padded = format!("{}un ion", "a ".repeat(20_000));
    let story = Story { headers: map(&[("x-q", &padded)]), ..Story::default() };
    assert!(story.holds(r#"request.headers["x-q"].replace(" ", "").endsWith("aaunion")"#));
    let escaped = format!("{}<b>", "<".repeat(30_000));
    let story = Story { headers: map(&[("x-q", &escaped)]), ..Story::default() };
    assert!(story.holds(r#"!request.headers["x-q"].replace("<", "&lt;").contains("<")"#));
    let story = Story { target: Uri::from_static("/?q=union%0A%20select"), ..Story::default() };
    assert!(story.holds(r#"request.args["q"].matches("(?i)union.*select")"#));
}

#[test]
fn a_byte_that_is_no_character_does_not_hide_what_stands_beside_it() {
    let mut story = Story::default();
    story.headers.insert("x-user", HeaderValue::from_bytes(b"evil\xff\xfebot").unwrap());
    for written in [
        r#"request.headers["x-user"].startsWith("evil") && request.headers["x-user"].endsWith("bot")"#,
        r#"request.headers["x-user"].contains("bot")"#,
        r#"request.headers["x-user"].matches("^evil..bot$")"#,
        r#"request.headers["x-user"].size() == 9 && request.headers["x-user"].substring(6) == "bot""#,
        r#"request.headers["x-user"] != """#,
    ] {
        assert!(story.holds(written), "{written}");
    }
    let copied = Value::build(r#"request.headers["x-user"]"#, Moment::Request).unwrap();
    assert_eq!(&*copied.of(&story.asked()), b"evil\xff\xfebot");
}

#[test]
fn a_header_is_compared_and_copied_where_it_lies() {
    let story = Story::default();
    for written in [r#"request.headers["x-user"]"#, "request.path", "request.cookies.sid", "request.args.n"] {
        let value = Value::build(written, Moment::Request).unwrap();
        assert!(matches!(value.of(&story.asked()), Cow::Borrowed(_)), "{written}");
    }
    // Here no name is repeated.
    let fields = [("host", "shop.example.com.:80"), ("x-user", "joe")];
    let plain = Story { headers: map(&fields), target: Uri::from_static("/"), ..Story::default() };
    for (written, text) in [
        ("request.host", "shop.example.com"),
        (r#"request.headers["x-user"]"#, "joe"),
        (r#"request.headers["x-many"].orValue(request.headers["x-user"])"#, "joe"),
        (r#"request.headers["x-user"].orValue(request.method)"#, "joe"),
        (r#"request.cookies.sid.orValue(request.args.n).orValue("none")"#, "none"),
    ] {
        let value = Value::build(written, Moment::Request).unwrap();
        assert!(matches!(value.of(&plain.asked()), Cow::Borrowed(found) if found == text.as_bytes()), "{written}");
    }
    hold(&[r#"request.headers["x-many"].orValue("none") == "a, b" && request.host.orValue("none").endsWith("e.com")"#]);
}

#[test]
fn operands_are_evaluated_in_the_order_of_their_effort_and_else_as_written() {
    let plan = |written| format!("{:?}", Condition::build(written, Moment::Match).unwrap().0.plan);
    let written = r#"request.path.matches("p") && "n" in request.args && (request.host == "h" || request.method == "M")
        && request.headers["f"].startsWith("x") && request.scheme == "s""#;
    let plan = plan(written);
    let places = ["Scheme", "Has", "Method", "Host", "StartsWith", "Matches"].map(|node| plan.find(node).unwrap());
    assert!(places.is_sorted(), "{places:?} in {plan}");
}

#[test]
fn conditions_are_joined_and_chosen() {
    hold(&[
        "true && true && true && true",
        "false || false || true",
        "!(true && false) && !false",
        "(1 < 2) == true && (1 > 2) != true",
        r#"(request.method == "GET" ? 1 : 2) == 1"#,
        r#"(false ? "a" : "b") == "b" && (true ? 1.5 : 2.5) == 1.5 && (true ? true : false)"#,
    ]);
}

#[test]
fn numbers_stay_in_their_bounds_and_divisions_by_zero_give_zero() {
    hold(&[
        "1 + 2 * 3 == 7 && 7 / 2 == 3 && -7 / 2 == -3 && 7 % 3 == 1 && -7 % 3 == -1",
        "9223372036854775807 + 1 == 9223372036854775807",
        "-9223372036854775807 - 5 == -9223372036854775807 - 1",
        "(-9223372036854775807 - 1) / -1 == 9223372036854775807",
        "9223372036854775807 * 2 == 9223372036854775807 && -(-9223372036854775807 - 1) == 9223372036854775807",
        "7 / (1 - 1) == 0 && 7 % (1 - 1) == 0 && (-9223372036854775807 - 1) % -1 == 0",
        "1 < 1.5 && 2.0 == 2 && 3 in [1, 3.0] && !(4 in [1, 2, 3])",
        "1.0 / 0.0 > 1.0e308 && int(1.0 / 0.0) == 9223372036854775807",
        "!(0.0 / 0.0 == 0.0 / 0.0) && int(0.0 / 0.0) == 0",
        r#"int("9223372036854775808") == 0 && int("-5") == -5 && double("1e3") == 1000.0"#,
    ]);
}

#[test]
fn text_is_cut_replaced_and_put_together() {
    assert_eq!(value(r#"request.host.split(".")[0] + "-" + string(source.port)"#), "shop-4711");
    assert_eq!(value(r#""tacocat".substring(3) + "|" + "tacocat".substring(1, 3) + "|""#), "ocat|ac|");
    assert_eq!(value(r#""abc".substring(9) + "abc".substring(2, 1) + "abc".substring(-1, 99)"#), "abc");
    assert_eq!(value(r#""grün".substring(2, 3) + string("grün".size())"#), "ü4");
    assert_eq!(value(r#""aXbXc".replace("X", "") + "abc".replace("", "-")"#), "abcabc");
    assert_eq!(value(r#""äbc".split("")[0] + string("a,b,".split(",").size()) + string("".split(",").size())"#), "ä31");
    assert_eq!(value(r#"" a ".trim() + "ÄbC".lowerAscii() + "äbc".upperAscii()"#), "aÄbcäBC");
    assert_eq!(value(r#"string(true) + string(1.5) + string(-3)"#), "true1.5-3");
    assert_eq!(value(r#"base64.encode("a\nb") + base64.decode("YQpi") + base64.decode("?")"#), "YQpia\nb");
}

#[test]
fn patterns_match_a_part_unless_they_are_bound() {
    hold(&[
        r#"request.path.matches("/v[0-9]+/") && !request.path.matches("^/v1$")"#,
        r#""x".matches(r"^\w$") && "".matches("^$") && "ÄÖ".matches("(?i)äö")"#,
    ]);
}

#[test]
fn addresses_are_asked_for_their_network() {
    hold(&[
        r#"cidr("192.0.2.0/24").containsIP(source.address) && !cidr("10.0.0.0/8").containsIP(source.address)"#,
        r#"cidr("::ffff:192.0.2.0/120").containsIP(source.address) && !cidr("::/0").containsIP(source.address)"#,
        r#"cidr("2001:db8::/32").containsIP("2001:db8:1::1") && !cidr("10.0.0.0/8").containsIP(request.host)"#,
        r#"ip(request.headers["x-none"]) != ip("::1") && isIP("::1") && !isIP(request.headers["x-user"])"#,
    ]);
    let mapped = Story { client: Some("::ffff:192.0.2.7"), ..Story::default() };
    assert!(mapped.holds(r#"cidr("192.0.2.0/24").containsIP(source.address) && source.address == "192.0.2.7""#));
    assert!(mapped.holds(r#"string(source.address) == "192.0.2.7""#));
}

#[test]
fn the_clients_pace_is_known() {
    hold(&["client.phase_age > 2 && client.phase_age < 3.0", "client.rate == 2000.0", "client.slow"]);
    let quick = Pace { phase: Phase::Header, age: Duration::from_micros(3), bytes: None };
    let quick = Story { pace: quick, ..Story::default() };
    assert!(quick.holds("!client.slow && client.phase_age < 0.001 && client.rate > 100000"));
    let steady = Pace { phase: Phase::Buffer, age: Duration::from_secs(60), bytes: Some(60 << 20) };
    assert!(Story { pace: steady, ..Story::default() }.holds("!client.slow && client.phase_age == 60"));
}

#[test]
fn an_expression_says_whether_it_reads_the_response() {
    let reads = |written| Condition::build(written, Moment::Response).unwrap().reads_response();
    assert!(reads("response.code >= 500") && reads("has(response.headers.age)"));
    assert!(!reads(r#"request.method == "GET""#));
}

/// What is said of a wrong expression, with its place and the text there.
fn said(written: &str) -> String {
    let Err(error) = Condition::build(written, Moment::Request) else { panic!("{written} is right") };
    let Some(Inside { bytes, line, column }) = error.inside else { panic!("{written} has no place") };
    format!("{line}:{column} `{}`: {}", &written[bytes], error.message)
}

#[test]
fn what_is_unknown_is_told_with_its_place_and_the_nearest_that_is_known() {
    for (written, told) in [
        ("request.pth == \"\"", "1:1 `request.pth`: nothing is called `request.pth`: did you mean `request.path`?"),
        (
            "true &&\n  request.hedaers[\"x\"] == \"\"",
            "2:3 `request.hedaers`: nothing is called `request.hedaers`: did you mean `request.headers`?",
        ),
        ("requst.path == \"\"", "1:1 `requst.path`: nothing is called `requst.path`: did you mean `request.path`?"),
        (
            "source.country == \"\"",
            "1:1 `source.country`: nothing is called `source.country`: there are `source.address`, `source.network`, `source.port`",
        ),
        ("route == \"\"", "1:1 `route`: nothing is called `route`: name a field of it, one of `route.name`"),
        (
            "source == \"\"",
            "1:1 `source`: nothing is called `source`: name a field of it, one of `source.address`, `source.network`, `source.port`",
        ),
        (
            "joe == \"\"",
            "1:1 `joe`: nothing is called `joe`: names begin with `request`, `source`, `connection`, `route`, `auth`, `jwt`, `response`, `client`; text stands in quotes",
        ),
        (
            "request.path.startWith(\"/\")",
            "1:14 `startWith`: there is no function `startWith`: did you mean `startsWith`?",
        ),
        ("lower(request.path) == \"\"", "1:1 `lower`: there is no function `lower`: did you mean `lowerAscii`?"),
        (
            "request.path.size(1) == 1",
            "1:14 `size`: `size` does not take these arguments: it is `size(string | list) int`",
        ),
        (
            "base64.encod(\"a\") == \"\"",
            "1:8 `encod`: there is no function `base64.encod`: did you mean `base64.encode`?",
        ),
        (
            "request.path.length == 1",
            "1:1 `request.path.length`: `request.path` has no fields: functions are called with brackets, as in `request.path.size()`",
        ),
    ] {
        assert_eq!(said(written), told);
    }
}

#[test]
fn wrong_types_are_told_with_their_place() {
    for (written, told) in [
        (
            "request.path == 1",
            "1:1 `request.path == 1`: `request.path` is text (string) and `1` a whole number (int), which are never the same: write the number in quotes, or `int(…)` around the text",
        ),
        (
            "request.path",
            "1:1 `request.path`: this is text (string), and a condition holds or does not: compare it, as in `request.method == \"GET\"`",
        ),
        (
            "request.path && true",
            "1:1 `request.path`: `request.path` is text (string): expected a condition, such as `request.method == \"GET\"`",
        ),
        (
            "request.headers == \"\"",
            "1:1 `request.headers == \"\"`: `request.headers` is a map and `\"\"` text (string), which are never the same: name a field, as in `request.headers[\"x-user\"]`",
        ),
        (
            "source.address < source.address",
            "1:1 `source.address < source.address`: two addresses cannot be compared in this way",
        ),
        (
            "source.address == \"10.0.0.300\"",
            "1:19 `\"10.0.0.300\"`: `10.0.0.300` is not an address: write one such as `192.0.2.1` or `2001:db8::1`",
        ),
        (
            "\"a\" + 1 == \"a1\"",
            "1:7 `1`: `+` does not take text (string) and a whole number (int): write `string(…)` around what is not text",
        ),
        (
            "1 + 1.5 == 2.5",
            "1:5 `1.5`: `+` does not take a whole number (int) and a number (double): write `double(…)` around the whole number",
        ),
        ("1 / 0 == 1", "1:1 `1 / 0`: a division by zero: it would always give 0"),
        (
            "(true ? 1 : \"a\") == 1",
            "1:2 `true ? 1 : \"a\"`: `?:` gives a whole number (int) or text (string): make both sides of one type",
        ),
        (
            "\"a\" in request.path",
            "1:8 `request.path`: `in` asks a list: for a part of a text, write `request.path.contains(\"a\")`",
        ),
        (
            "request.path in [\"a\", 1]",
            "1:23 `1`: `1` is a whole number (int): expected text, as the one that is looked for",
        ),
        ("request.path.startsWith(1)", "1:25 `1`: `1` is a whole number (int): expected text"),
        ("-request.path == 1", "1:2 `request.path`: `request.path` is text (string): expected a number behind `-`"),
    ] {
        assert_eq!(said(written), told);
    }
}

#[test]
fn what_cannot_be_is_told_with_its_place() {
    for (written, told) in [
        (
            "response.code == 500",
            "1:1 `response.code`: `response.code` comes too early: there is no response yet where this is asked",
        ),
        (
            "has(response.headers.age)",
            "1:5 `response.headers`: `response.headers` comes too early: there is no response yet where this is asked",
        ),
        ("request.path.matches(\"a(b\")", "1:22 `\"a(b\"`: `a(b` is not a usable pattern: unclosed group"),
        (
            "request.path.matches(request.host)",
            "1:22 `request.host`: a pattern is a literal, so that it is compiled once: write it in quotes",
        ),
        ("request.headers[\"x y\"] == \"\"", "1:17 `\"x y\"`: `x y` is not a valid header name"),
        (
            "request.headers[request.path] == \"\"",
            "1:17 `request.path`: this is named by a literal, so that it is looked up once: write it in quotes",
        ),
        (
            "cidr(\"10.0.0.0/33\").containsIP(source.address)",
            "1:6 `\"10.0.0.0/33\"`: `10.0.0.0/33` is not a network: write one such as `10.0.0.0/8` or `2001:db8::/32`",
        ),
        (
            "has(request.headers.x-user)",
            "1:22 `-`: `has` takes a field such as `request.headers.host`: for a name with a `-`, write `\"x-user\" in request.headers`",
        ),
        (
            "request.headers.x-user == \"a\"",
            "1:17 `x-user`: `-` is a minus here: for a name with a `-`, write `request.headers[\"x-user\"]`",
        ),
        (
            "has(request.path)",
            "1:1 `has(request.path)`: `has` asks for a field of `request.headers`, `request.cookies`, `request.args`, `jwt.claims` or `response.headers`: everything else is always there",
        ),
        ("\"a,b\".split(\",\")[-1] == \"\"", "1:18 `-1`: items are counted from 0"),
        ("request.args.values(\"a\")[-1] == \"\"", "1:26 `-1`: items are counted from 0"),
        (
            "\"a\" in request.args.values(request.path)",
            "1:28 `request.path`: this is named by a literal, so that it is looked up once: write it in quotes",
        ),
        (
            "\"a\" in request.path.values(\"a\")",
            "1:8 `request.path`: `values` asks `request.headers`, `request.cookies`, `request.args`, `jwt.claims` or `response.headers`, as in `\"1\" in request.args.values(\"debug\")`",
        ),
        ("1u == 1", "1:1 `1u`: numbers without a sign are not offered: leave the `u` out"),
        ("request.path == null", "1:17 `null`: there is no `null`: what is missing reads as an empty text"),
        (
            "{\"a\": 1} == 1",
            "1:1 `{\"a\": 1}`: maps cannot be written here: use `a ? b : c`, or several rules with a `when` each",
        ),
    ] {
        assert_eq!(said(written), told);
    }
    assert!(
        said("[\"a\"].all(x, x == \"a\")")
            .contains("`all`, `exists`, `exists_one`, `map` and `filter` are not offered")
    );
    assert!(said("request.headers.exists(h, h == \"a\")").contains("are not offered"));
}

#[test]
fn what_is_no_expression_is_told_in_words_and_not_in_tokens() {
    for (written, told) in [
        ("request.path == ", "1:15 `=`: the expression ends too early: something is missing behind this"),
        ("(request.path == \"a\"", "1:20 `\"`: the expression ends too early: `)` is missing"),
        ("request.path = \"a\"", "1:14 `=`: `=` is not an operator: write `==`"),
        ("true & false", "1:6 `&`: `&` is not an operator: write `&&`"),
        ("true and false", "1:6 `and`: `and` is not expected here"),
        ("true)", "1:5 `)`: `)` is not expected here"),
        (
            "request.path == \"a",
            "1:17 `\"`: this text has no closing quote, or a `\\` in it that means nothing: write `\\\\` for a backslash, or `r\"…\"` around a pattern",
        ),
        (
            "request.path.matches(\"\\d\")",
            "1:22 `\"`: this text has no closing quote, or a `\\` in it that means nothing: write `\\\\` for a backslash, or `r\"…\"` around a pattern",
        ),
        ("true && #", "1:9 `#`: `#` has no meaning in an expression"),
        ("\"ä\" == #", "1:8 `#`: `#` has no meaning in an expression"),
        ("if == 1", "1:1 `if`: `if` is a word that CEL keeps for itself"),
        (
            "request.?path == \"\"",
            "1:8 `.`: this way of writing is not offered: what is missing reads as an empty text anyway",
        ),
        (
            "1 == 99999999999999999999",
            "1:6 `99999999999999999999`: `99999999999999999999` is not an integer of 64 bits",
        ),
        ("", "1:1 ``: this expression is empty: write one such as `request.method == \"GET\"`"),
        (" \n ", "1:1 ``: this expression is empty: write one such as `request.method == \"GET\"`"),
    ] {
        assert_eq!(said(written), told);
    }
}

#[test]
fn a_value_is_text_and_says_so() {
    let told = |written| Value::build(written, Moment::Request).unwrap_err().message;
    assert_eq!(told("1 + 1"), "this is a whole number (int), and text is expected here: write `string(…)` around it");
    assert_eq!(told("request.headers"), "this is a map, and text is expected here: take an item of it");
    assert_eq!(told("\"a\".split(\"b\")"), "this is a list, and text is expected here: take an item of it");
}

#[test]
fn an_expression_of_any_shape_is_read_or_refused_in_short_time() {
    let shapes: Vec<String> = vec![
        "(".repeat(4000),
        format!("{}true{}", "(".repeat(1000), ")".repeat(1000)),
        format!("{}true{}", "(".repeat(60), ")".repeat(60)),
        format!("{}true", "!".repeat(4001)),
        format!("{}1 == 1", "-".repeat(4000)),
        format!("{}true", "true&&".repeat(600)),
        format!("{}1 == 1", "1+".repeat(2000)),
        format!("{}\"a\" == \"a\"", "\"a\"+".repeat(900)),
        format!("a{}", ".b".repeat(2000)),
        format!("{}true", "true?true:".repeat(400)),
        format!("{}true", "true==".repeat(600)),
        format!("\"a\"{} == \"\"", ".trim()".repeat(500)),
        format!("\"a\" in [{}]", "\"a\",".repeat(900)),
        format!("{}1{} == 1", "size(string(".repeat(150), "))".repeat(150)),
        "x".repeat(5000),
        format!("request.path.matches(\"{}\")", "(a{1,99}){1,99}".repeat(9)),
    ];
    for shape in shapes {
        let begin = Instant::now();
        let built = Condition::build(&shape, Moment::Request);
        if let Ok(condition) = &built {
            condition.holds(&Story::default().asked());
        }
        let shown: String = shape.chars().take(30).collect();
        assert!(begin.elapsed() < Duration::from_secs(10), "{shown} took {:?}", begin.elapsed());
        if let Err(error) = built {
            assert!(error.inside.is_some_and(|inside| inside.bytes.end <= shape.len()), "{shown}");
        }
    }
    assert!(said(&"(".repeat(100)).contains("more than 64 deep"));
    assert!(said(&format!("{} == \"\"", vec!["request.path"; 70].join("+"))).contains("more than 64 texts"));
    assert!(said(&"x".repeat(5000)).contains("longer than 4096 bytes"));
}

#[test]
fn text_cannot_be_made_to_grow_without_end() {
    let grow = ".replace(\"a\", \"aaaaaaaaaaaaaaaa\")";
    let grown = value(&format!("\"a\"{}", grow.repeat(60)));
    assert_eq!(grown.len(), 256 * 1024);
}

/// Something that may stand in an expression, or not.
fn token() -> impl Strategy<Value = String> {
    let known: Vec<String> = VARIABLES.iter().map(|known| known.name.to_owned()).collect();
    let calls: Vec<String> = FUNCTIONS.iter().map(|known| format!(".{}(", known.name)).collect();
    prop_oneof![
        3 => prop::sample::select(known),
        2 => prop::sample::select(calls),
        5 => prop::sample::select(tokens::SIGNS).prop_map(str::to_owned),
        1 => ".{0,3}",
    ]
}

/// Requests as the worst of clients send them: names that rules ask for, doubled or not there, with any bytes.
fn hostile() -> impl Strategy<Value = Story> {
    let names = ["host", "x-user", "cookie", "content-length", "transfer-encoding", "x-request-id"];
    let value = prop_oneof![
        prop::collection::vec(any::<u8>(), 0..40),
        prop::sample::select(vec![
            "",
            ",",
            ",,",
            "a=;=;a",
            "sid=1;sid=2",
            ":",
            "[::1]:",
            "-1",
            "\u{e4},\u{1F600}",
            "%",
            "%0"
        ])
        .prop_map(|text| text.as_bytes().to_vec()),
        (0..40_000usize).prop_map(|length| vec![b'a'; length]),
    ];
    let fields = prop::collection::vec((prop::sample::select(names.to_vec()), value), 0..8);
    let queries =
        ["/", "/?", "*", "/?=", "/?&&=&a", "/?q=%", "/?q=%F", "/?q=%FF&q=%00+", "/a?q=1&n=&n=%2C", "/%ff?%71=x"];
    let clients = [None, Some("::"), Some("0.0.0.0"), Some("::ffff:255.255.255.255"), Some("fe80::1")];
    (fields, prop::sample::select(queries.to_vec()), prop::sample::select(clients.to_vec()), any::<(bool, u64)>())
        .prop_map(|(fields, target, client, (ended, bytes))| {
            let mut headers = HeaderMap::new();
            for (name, value) in fields {
                if let Ok(value) = HeaderValue::from_bytes(&value) {
                    headers.append(HeaderName::from_static(name), value);
                }
            }
            let pace = Pace { phase: Phase::Header, age: Duration::from_nanos(bytes), bytes: Some(bytes) };
            Story { target: target.parse().unwrap(), headers, client, ended, pace, ..Story::default() }
        })
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 400, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn no_request_makes_a_rule_fail(written in prop_oneof![condition(), sound()], story in hostile()) {
        // What is generated may be longer, or put more together, than an expression may.
        let is_bounded = |message: &str| message.contains("split it") || message.contains("split the expression");
        let condition = Condition::build(&written, Moment::Response);
        prop_assume!(!matches!(&condition, Err(error) if is_bounded(&error.message)));
        prop_assert!(condition.is_ok(), "{written}: {condition:?}");
        let condition = condition.unwrap();
        prop_assert_eq!(condition.holds(&story.asked()), condition.holds(&story.asked()), "{}", written);
        let text = Value::build(&format!("string({written})"), Moment::Response);
        prop_assume!(!matches!(&text, Err(error) if is_bounded(&error.message)));
        let text = text.unwrap();
        prop_assert!(matches!(&*text.of(&story.asked()), b"true" | b"false"));
    }
}

/// A sound condition in which names and functions of every kind stand, those too that the interpreter of `cel` lacks.
fn sound() -> impl Strategy<Value = String> {
    let texts: Vec<String> =
        VARIABLES.iter().filter(|known| known.kind == "string").map(|known| known.name.to_owned()).collect();
    let fields = ["request.headers", "request.cookies", "request.args", "response.headers"];
    let names = ["host", "cookie", "sid", "q", "n", "a", "x-user"];
    let field = (prop::sample::select(fields.to_vec()), prop::sample::select(names.to_vec()));
    let number = prop_oneof![
        Just("request.size".to_owned()),
        Just("source.port".to_owned()),
        Just("response.code".to_owned()),
        any::<i64>().prop_map(|number| format!("int(\"{number}\")")),
    ];
    let text = prop_oneof![
        prop::sample::select(texts),
        field.clone().prop_map(|(map, name)| format!("{map}[\"{name}\"]")),
        (field.clone(), 0..4i64).prop_map(|((map, name), at)| format!("{map}.values(\"{name}\")[{at}]")),
        Just("string(source.address)".to_owned()),
        Just("string(client.rate / client.phase_age)".to_owned()),
        Just("request.headers[\"x-none\"]".to_owned()),
    ];
    let text = text.prop_recursive(3, 12, 3, move |inner| {
        let number = number.clone();
        prop_oneof![
            (inner.clone(), number.clone(), number.clone()).prop_map(|(a, b, c)| format!("{a}.substring({b}, {c})")),
            (inner.clone(), inner.clone(), number.clone()).prop_map(|(a, b, c)| format!("{a}.split({b})[{c}]")),
            (inner.clone(), inner.clone(), inner.clone()).prop_map(|(a, b, c)| format!("{a}.replace({b}, {c})")),
            (inner.clone(), number.clone(), number.clone())
                .prop_map(|(a, b, c)| format!("string(int({a}) * {b} / {c} % {b} - hash({a}) + {c})")),
            inner.clone().prop_map(|a| format!("string(int(double({a}) / 0.0) + size({a}.split({a})))")),
            inner.clone().prop_map(|a| format!("(base64.decode({a}) + base64.encode({a}))")),
            (inner.clone(), inner).prop_map(|(a, b)| format!("string(ip({a})).orValue({b}).trim().upperAscii()")),
        ]
    });
    (text.clone(), text, field).prop_map(|(a, b, (map, name))| {
        format!(
            "{a} == {b} || {a} in {map}.values(\"{name}\") || {a}.matches(\"(?i)^.{{0,3}}(a|\u{e4})+$\") || isIP({a}) \
             || cidr(\"::/0\").containsIP({b}) || source.address in [{a}, {b}] || {a} in {b}.split({a})"
        )
    })
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 400, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn whatever_is_written_there_is_an_answer_at_a_place_in_it(tokens in prop::collection::vec(token(), 0..16)) {
        let written = tokens.concat();
        for moment in [Moment::Request, Moment::Response] {
            match Condition::build(&written, moment) {
                Ok(condition) => _ = condition.holds(&Story::default().asked()),
                Err(error) => {
                    let place = error.inside.as_ref().and_then(|inside| written.get(inside.bytes.clone()));
                    prop_assert!(place.is_some(), "{error:?}");
                    prop_assert!(!error.message.contains("in a simpler way"), "reading {written:?} has panicked");
                }
            }
            match Value::build(&written, moment) {
                Ok(value) => _ = value.of(&Story::default().asked()),
                Err(error) => prop_assert!(!error.message.is_empty()),
            }
        }
    }
}

/// An expression of each type in which our language and the interpreter of the `cel` crate agree: headers that are
/// there, indexes and numbers in bounds, no division by zero.
fn text() -> BoxedStrategy<String> {
    let leaf = prop_oneof![
        Just("request.method".to_owned()),
        Just("request.path".to_owned()),
        Just("request.headers[\"x-user\"]".to_owned()),
        Just("request.headers.host".to_owned()),
        prop::sample::select(vec!["\"\"", "\"a\"", "\"/api\"", "\"joe\"", "\"ä b\"", "'GET'", "\"a.b.c\""])
            .prop_map(str::to_owned),
    ];
    leaf.prop_recursive(3, 24, 3, |inner| {
        prop_oneof![
            (inner.clone(), inner.clone()).prop_map(|(a, b)| format!("({a} + {b})")),
            inner.clone().prop_map(|a| format!("{a}.lowerAscii()")),
            inner.clone().prop_map(|a| format!("{a}.upperAscii()")),
            inner.clone().prop_map(|a| format!("{a}.trim()")),
            (inner.clone(), inner.clone()).prop_map(|(a, b)| format!("{a}.replace(\"a\", {b})")),
            inner.clone().prop_map(|a| format!("{a}.split(\".\")[0]")),
            inner.clone().prop_map(|a| format!("({a} + \"abc\").substring(1, 3)")),
            inner.clone().prop_map(|a| format!("string(size({a}))")),
            (condition_of(inner.clone()), inner.clone(), inner).prop_map(|(c, a, b)| format!("({c} ? {a} : {b})")),
        ]
    })
    .boxed()
}

fn condition_of(text: impl Strategy<Value = String> + Clone + 'static) -> impl Strategy<Value = String> + Clone {
    let compared = prop::sample::select(vec!["==", "!=", "<", "<=", ">", ">="]);
    let asked = prop::sample::select(vec!["startsWith", "endsWith", "contains"]);
    let pattern = prop::sample::select(vec!["^/", "o", "[a-c]+$", "(?i)get|b", "^$"]);
    let number = (text.clone(), -3..9i64, 1..4i64).prop_map(|(a, b, c)| format!("(size({a}) * {c} + {b}) % {c}"));
    prop_oneof![
        (text.clone(), compared.clone(), text.clone()).prop_map(|(a, op, b)| format!("({a} {op} {b})")),
        (text.clone(), asked, text.clone()).prop_map(|(a, f, b)| format!("{a}.{f}({b})")),
        (text.clone(), pattern).prop_map(|(a, p)| format!("{a}.matches(\"{p}\")")),
        (text.clone(), text.clone(), text.clone()).prop_map(|(a, b, c)| format!("({a} in [{b}, {c}])")),
        (text.clone(), text).prop_map(|(a, b)| format!("({a} in {b}.split(\".\"))")),
        (number.clone(), compared, number).prop_map(|(a, op, b)| format!("({a} {op} {b})")),
        prop::sample::select(vec!["true", "false", "has(request.headers.host)", "has(request.headers.nothing)"])
            .prop_map(str::to_owned),
        prop::sample::select(vec!["(\"x-user\" in request.headers)", "(\"x\" in request.headers)"])
            .prop_map(str::to_owned),
    ]
}

fn condition() -> impl Strategy<Value = String> {
    condition_of(text()).prop_recursive(3, 16, 3, |inner| {
        prop_oneof![
            (inner.clone(), inner.clone()).prop_map(|(a, b)| format!("({a} && {b})")),
            (inner.clone(), inner.clone(), inner.clone()).prop_map(|(a, b, c)| format!("({a} || {b} || {c})")),
            inner.clone().prop_map(|a| format!("!{a}")),
            (inner.clone(), inner.clone()).prop_map(|(a, b)| format!("({a} == {b})")),
            (inner.clone(), inner.clone(), inner).prop_map(|(a, b, c)| format!("({a} ? {b} : {c})")),
        ]
    })
}

/// What the interpreter of the `cel` crate makes of an expression.
fn interpreted(written: &str, story: &Story) -> Result<cel::Value, String> {
    let asked = story.asked();
    interpreter::interpreted(written, asked.method.as_str(), asked.facts.path, asked.headers)
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 600, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn the_plan_says_what_the_interpreter_says(written in condition()) {
        prop_assume!(written.len() <= BYTES_MAX);
        let story = Story::default();
        let ours = Condition::build(&written, Moment::Request);
        prop_assert!(ours.is_ok(), "{written}: {ours:?}");
        let theirs = interpreted(&written, &story);
        prop_assert_eq!(theirs, Ok(cel::Value::Bool(ours.unwrap().holds(&story.asked()))), "{}", written);
    }

    #[test]
    fn text_is_what_the_interpreter_makes_of_it(written in text()) {
        prop_assume!(written.len() <= BYTES_MAX);
        let story = Story::default();
        let ours = Value::build(&written, Moment::Request);
        prop_assert!(ours.is_ok(), "{written}: {ours:?}");
        let ours = ours.unwrap();
        let ours = String::from_utf8_lossy(&ours.of(&story.asked())).into_owned();
        let theirs = interpreted(&written, &story);
        prop_assert_eq!(theirs, Ok(cel::Value::String(Arc::new(ours))), "{}", written);
    }
}
