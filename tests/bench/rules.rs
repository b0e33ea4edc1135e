//! Ten rules for the benchmarks that measure the cost of rules.

/// Rules as operators write them. None is true for the requests of the benchmarks, so each of them is evaluated.
pub const RULES: [&str; 10] = [
    r#"request.headers["user-agent"].matches("(?i)scrapy|python-requests|headless")"#,
    r#"request.path.startsWith("/api/") && request.headers["x-user"] != """#,
    r#"!cidr("127.0.0.0/8").containsIP(source.address)"#,
    r#"request.cookies["beta"] == "1" || request.args["debug"] == "1""#,
    r#"request.method in ["PUT", "DELETE"] || "x-admin" in request.headers"#,
    r#"request.headers["accept-language"].startsWith("de") && request.path == "/""#,
    r#"cidr("10.0.0.0/8").containsIP(source.address)"#,
    r#"request.host.endsWith(".example.com") && request.scheme == "https""#,
    r#"request.headers["x-api-key"].orValue(request.args["key"]) == "secret""#,
    r#"request.path.matches("^/shop/[0-9]+/(cart|order)$")"#,
];
