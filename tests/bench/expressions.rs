//! The cost of a condition and of a value per request, and the cost of compiling them.
//!
//! `cargo bench --bench expressions`

use std::hint::black_box;
use std::net::IpAddr;

use criterion::{Criterion, criterion_group, criterion_main};
use forebay::expression::{Asked, Condition, Facts, Moment, Value};
use http::{HeaderMap, HeaderName, HeaderValue, Method, Uri, Version};

/// Rules as operators write them; each is true for the request below.
const CONDITIONS: [(&str, &str); 6] = [
    ("path and header", r#"request.path.startsWith("/api") && request.headers["x-user"] != """#),
    ("pattern", r#"request.headers["user-agent"].matches("(?i)bot|crawler|spider")"#),
    (
        "method, presence, presence",
        r#"request.method in ["PUT", "POST"] || "x-user" in request.headers || has(request.headers.host)"#,
    ),
    ("network", r#"cidr("10.0.0.0/8").containsIP(source.address)"#),
    ("cookie or share of addresses", r#"request.cookies["beta"] == "1" || hash(source.address) % 100 < 100"#),
    ("a missing header", r#"request.headers["x-token"] != "s3cret""#),
];

const VALUES: [(&str, &str); 3] = [
    ("header", r#"request.headers["x-user"]"#),
    ("first label of the host", r#"request.host.split(".")[0]"#),
    ("key or address", r#"request.headers["x-api-key"].orValue(source.network)"#),
];

/// The header of a browser's request, 14 fields.
fn headers() -> HeaderMap {
    let mut headers = HeaderMap::new();
    for number in 0..11 {
        let name = HeaderName::try_from(format!("x-h{number}")).expect("a name");
        headers.insert(name, HeaderValue::from_static("some value"));
    }
    headers.insert("host", HeaderValue::from_static("shop.example.com"));
    headers.insert("x-user", HeaderValue::from_static("joe"));
    headers.insert("user-agent", HeaderValue::from_static("Mozilla/5.0 (compatible; SomeBot/2.1)"));
    headers
}

fn expressions(c: &mut Criterion) {
    let (headers, target) = (headers(), Uri::from_static("/api/v1"));
    let facts = Facts { client: Some(IpAddr::from([10, 1, 2, 3])), ..Facts::of("shop", "/api/v1") };
    let asked = Asked {
        facts,
        method: &Method::GET,
        target: &target,
        version: Version::HTTP_11,
        headers: &headers,
        response: None,
    };
    let mut group = c.benchmark_group("condition");
    for (name, written) in CONDITIONS {
        let condition = Condition::build(written, Moment::Request).expect("a sound condition");
        assert!(condition.holds(&asked), "{written}");
        group.bench_function(name, |b| b.iter(|| condition.holds(black_box(&asked))));
    }
    group.finish();
    let mut group = c.benchmark_group("value");
    for (name, written) in VALUES {
        let value = Value::build(written, Moment::Request).expect("a sound value");
        group.bench_function(name, |b| b.iter(|| value.of(black_box(&asked)).len()));
    }
    group.finish();
    let build =
        |b: &mut criterion::Bencher<'_>| b.iter(|| Condition::build(black_box(CONDITIONS[0].1), Moment::Request));
    c.bench_function("build", build);
}

criterion_group!(benches, expressions);
criterion_main!(benches);
