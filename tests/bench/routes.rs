//! The cost of selecting a route from 10 and from 10,000 routes.
//!
//! `cargo bench --bench routes`

use std::collections::BTreeMap;
use std::hint::black_box;

use criterion::{BenchmarkId, Criterion, criterion_group, criterion_main};
use forebay::config::route::{Match, PathMatch, ValueMatch};
use forebay::proxy::routes::table::{Query, Table};
use http::{HeaderMap, HeaderValue, Method};

/// The rule with number `n` of a kind.
type Rule = fn(usize) -> Match;

/// The conditions that distinguish many routes.
const KINDS: [(&str, Rule); 7] = [
    ("hosts", |n| host(&format!("shop{n}.example.com"))),
    ("wildcards", |n| host(&format!("*.shop{n}.example.com"))),
    ("exact paths", |n| path(PathMatch::Exact(format!("/shop{n}/cart/items")))),
    ("prefixes", |n| path(PathMatch::Prefix(format!("/shop{n}/cart")))),
    ("regexes", |n| path(PathMatch::Regex(format!("/shop{n}/[a-z]+/items")))),
    ("regexes without a beginning", |n| path(PathMatch::Regex(format!(".*[a-z]{n}/cart/items")))),
    ("headers", |n| header(&format!("shop{n}"))),
];

fn host(name: &str) -> Match {
    Match { hosts: vec![name.to_owned()], ..Match::default() }
}

fn path(path: PathMatch) -> Match {
    Match { path: Some(path), ..host("shop7.example.com") }
}

fn header(tenant: &str) -> Match {
    let headers = BTreeMap::from([("x-tenant".to_owned(), ValueMatch::Exact(tenant.to_owned()))]);
    Match { headers, ..path(PathMatch::Prefix("/".to_owned())) }
}

/// The header of a browser's request, with a tenant.
fn headers() -> HeaderMap {
    let mut headers = HeaderMap::new();
    for name in ["host", "user-agent", "accept", "accept-language", "accept-encoding", "cookie", "x-tenant"] {
        headers.insert(name, HeaderValue::from_static("shop7"));
    }
    headers
}

fn find(c: &mut Criterion) {
    let headers = headers();
    let none = HeaderMap::new();
    for (kind, rule) in KINDS {
        let wild = kind == "wildcards";
        let hit = Query {
            method: &Method::GET,
            host: if wild { "www.shop7.example.com" } else { "shop7.example.com" },
            path: "/shop7/cart/items",
            query: Some("page=2"),
            headers: &headers,
        };
        let host = if wild || kind == "hosts" { "www.nobody.example.com" } else { hit.host };
        let miss = Query { host, path: "/nobody/cart/nothing", headers: &none, ..hit };
        let mut group = c.benchmark_group(kind);
        for number in [10, 10_000] {
            let rules: Vec<Match> = (0..number).map(rule).collect();
            let table = Table::build(rules.iter().zip(0usize..).collect()).expect("the rules of this bench are sound");
            for (outcome, query, expected) in [("hit", hit, Some(&7)), ("miss", miss, None)] {
                assert_eq!(table.find(&query, |_, _| true), expected, "{kind}");
                group.bench_function(BenchmarkId::new(outcome, number), |b| {
                    b.iter(|| table.find(black_box(&query), |_, _| true))
                });
            }
        }
    }
}

criterion_group!(benches, find);
criterion_main!(benches);
