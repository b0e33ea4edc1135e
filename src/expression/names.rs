//! Every name and function of expressions, once: what they are, and what they are called in errors and in the manual.
//!
//! The planner makes nodes of them; a test asks that it knows each of these and no other.
//! `conf/manual/expressions.md` is made of these tables.

use std::fmt::Write;

/// A name that stands for a value of the exchange.
#[derive(Debug)]
pub struct Variable {
    /// How it is written.
    pub name: &'static str,
    /// Its type, as CEL calls it.
    pub kind: &'static str,
    /// What it is.
    pub doc: &'static str,
}

/// A function, which may be called on its first argument.
#[derive(Debug)]
pub struct Function {
    /// Its name.
    pub name: &'static str,
    /// How it is called, with the types.
    pub form: &'static str,
    /// What it gives.
    pub doc: &'static str,
    /// An example that holds for any request.
    pub example: &'static str,
}

macro_rules! variables {
    ($($name:literal: $kind:literal, $doc:literal;)*) => {
        /// The names, in the order of the manual.
        pub const VARIABLES: &[Variable] = &[$(Variable { name: $name, kind: $kind, doc: $doc }),*];
    };
}

variables! {
    "request.method": "string", "The method, such as `GET`.";
    "request.path": "string",
        "The path as routes see it: the client's, in canonical form, without the query. A `rewrite` does not \
         change it.";
    "request.target": "string",
        "Path and query as they are now: as the client sent them, or as filters before have rewritten them.";
    "request.query": "string", "The query as it was sent, without `?`; `\"\"` if there is none.";
    "request.host": "string", "The host that was asked for, in lower case and without its port, as routes see it.";
    "request.scheme": "string", "`http` or `https`, as the client spoke it, or as a trusted proxy says.";
    "request.version": "string", "`1.0`, `1.1` or `2`.";
    "request.id": "string", "`X-Request-Id`; behind the filter `request_id`, the id that it gave.";
    "request.size": "int",
        "What `Content-Length` announces; 0 without a body. A body whose length is not known before its end counts as \
         9223372036854775807 bytes, so that no limit is got past by leaving the length out.";
    "request.time": "int", "When the request began to come, in seconds since 1970 (UTC).";
    "request.headers": "map",
        "Headers by name, in any case: `request.headers[\"x-user\"]`, or `request.headers.host`. Several values \
         are joined by `, `.";
    "request.cookies": "map", "Cookies by name. Several values are joined by `, `.";
    "request.args": "map", "Arguments of the query by name, decoded. Several values are joined by `, `.";
    "source.address": "ip", "The client's address, as seen through `trusted_proxies`; none on a unix socket.";
    "source.network": "string",
        "What counts as one client, as `ipv4_prefix` and `ipv6_prefix` say: by default its address, of IPv6 the \
         network of \
         64 bits that it is in, such as `2001:db8::/64`. `\"\"` on a unix socket.";
    "source.port": "int", "The client's port; 0 behind a trusted proxy and on a unix socket.";
    "connection.listener": "string", "The name of the listener that the client came to.";
    "connection.tls_version": "string", "The version of TLS, such as `TLSv1.3`; `\"\"` in clear text.";
    "connection.sni": "string", "The server name that the client asked for in TLS; `\"\"` if it named none.";
    "connection.peer_subject": "string", "The subject of the client's certificate; `\"\"` if it showed none.";
    "connection.peer_names": "list",
        "The further names in it: hosts, mail addresses and URIs. A comma in one of them is `%2C`.";
    "connection.peer_fingerprint": "string", "SHA-256 of it, in hexadecimal.";
    "route.name": "string", "The name of the route.";
    "auth.user": "string",
        "The user, key or subject that a filter before has let in (`basic_auth`, `api_key`, `jwt`, `forward_auth`); \
         `\"\"` if none has. Not in `match.when`, which is asked before any filter.";
    "auth.by": "string", "Which of these filters that was.";
    "jwt.claims": "map",
        "Claims of the token that `jwt` has accepted: `jwt.claims.tenant`, `jwt.claims[\"realm_access.roles\"]`. The \
         items of a list are joined by `, `; `jwt.claims.values(\"roles\")` has each.";
    "response.code": "int", "The status of the response; 0 if none was sent.";
    "response.headers": "map", "Headers of the response, as `request.headers`.";
    "response.reason": "string",
        "Why Forebay refuses the request, such as `wait.timeout`; `\"\"` for the answer of an endpoint or of a filter.";
    "response.message": "string", "The sentence of that reason that the client gets; `\"\"` likewise.";
    "client.phase_age": "double",
        "Seconds of the last phase in which the client was waited for: `header` while a request is routed, \
         `buffer` once its body is here, `write` in logs.";
    "client.rate": "double", "Bytes a second that the client moved in that phase.";
    "client.slow": "bool", "That phase took a second or more, at less than 4096 bytes a second.";
}

macro_rules! functions {
    ($($name:literal, $form:literal: $doc:literal, $example:literal;)*) => {
        /// The functions, in the order of the manual.
        pub const FUNCTIONS: &[Function] = &[$(Function { name: $name, form: $form, doc: $doc, example: $example }),*];
    };
}

functions! {
    "startsWith", "string.startsWith(string) bool":
        "Whether the text begins with the other.", r#""/api/v1".startsWith("/api")"#;
    "endsWith", "string.endsWith(string) bool": "Whether the text ends with the other.", r#""a.png".endsWith(".png")"#;
    "contains", "string.contains(string) bool":
        "Whether the other text is somewhere in it.", r#""shopping".contains("opp")"#;
    "matches", "string.matches(string) bool":
        "Whether the pattern, a literal, matches some part of it (RE2 syntax; `^` and `$` bind it to the ends, and `.` is a line break, too).",
        r#""Googlebot/2.1".matches("(?i)bot|crawler")"#;
    "lowerAscii", "string.lowerAscii() string":
        "The text with ASCII letters in lower case.", r#""ABC".lowerAscii() == "abc""#;
    "upperAscii", "string.upperAscii() string":
        "The text with ASCII letters in upper case.", r#""abc".upperAscii() == "ABC""#;
    "trim", "string.trim() string": "The text without blanks at its ends.", r#"" a b ".trim() == "a b""#;
    "replace", "string.replace(string, string) string":
        "The text with the third in the place of each second. What exceeds 256 KiB is cut off.",
        r#""a-b-c".replace("-", "") == "abc""#;
    "substring", "string.substring(int[, int]) string":
        "The characters from the first number on, before the second; what lies outside is cut off.",
        r#""tacocat".substring(1, 4) == "aco""#;
    "split", "string.split(string) list":
        "The pieces between separators. Take one by `[0]` (`\"\"` if there is none), ask by `in`, count by \
         `size`.", r#""a.b.c".split(".")[1] == "b" && "c" in "a.b.c".split(".")"#;
    "values", "map.values(string) list":
        "Each value of a name by itself; of a header also each item between commas. Take one by `[0]`, ask by `in`, \
         count by `size`.",
        "!(\"1\" in request.args.values(\"no such argument\"))";
    "size", "size(string | list) int":
        "How many characters, or items.", r#"size("abc") == 3 && "a,b".split(",").size() == 2"#;
    "orValue", "string.orValue(string) string":
        "The text, or the other one if it is empty.", r#""".orValue("none") == "none""#;
    "int", "int(string | double) int":
        "The whole number; 0 for a text that is none.", r#"int("42") + int(1.9) == 43 && int("x") == 0"#;
    "double", "double(string | int) double": "The number; 0 for a text that is none.", r#"double("0.5") < double(1)"#;
    "string", "string(int | double | bool | ip) string":
        "How it is written; `\"\"` for an address that there is not.", r#"string(1 + 1) == "2""#;
    "hash", "hash(string | ip) int":
        "A number from 0 on, the same on every node and after every start (XXH3).", r#"hash("a") % 100 < 100"#;
    "ip", "ip(string) ip": "The address that is written there.", r#"ip("::ffff:192.0.2.1") == ip("192.0.2.1")"#;
    "isIP", "isIP(string) bool": "Whether an address is written there.", r#"isIP("2001:db8::1") && !isIP("a")"#;
    "cidr", "cidr(string) cidr":
        "The network, a literal, for `containsIP`.", r#"cidr("10.0.0.0/8").containsIP("10.1.2.3")"#;
    "containsIP", "cidr.containsIP(ip | string) bool":
        "Whether the address is in the network; no address is in none.",
        r#"!cidr("2001:db8::/32").containsIP(ip("192.0.2.1"))"#;
    "has", "has(map.field) bool":
        "Whether a header, a cookie or an argument is there; for names with a `-`, write `\"x-user\" in \
         request.headers`.", r#"has(request.headers.nothing) == ("nothing" in request.headers)"#;
    "base64.encode", "base64.encode(string) string": "The text in base64.", r#"base64.encode("hello") == "aGVsbG8=""#;
    "base64.decode", "base64.decode(string) string":
        "What the base64 stands for, with padding or without; `\"\"` if it is none.",
        r#"base64.decode("aGVsbG8") == "hello""#;
}

/// The operators with what they take, in the order of the manual.
pub const OPERATORS: &[(&str, &str)] = &[
    ("`a && b`, `a || b`, `!a`", "conditions; the second is asked only if it matters"),
    ("`a ? b : c`", "`b` if `a` holds, else `c`; both of one type"),
    (
        "`==`, `!=`",
        "text, numbers of either kind, conditions, addresses; an address also with a literal: `source.address == \"::1\"`",
    ),
    ("`<`, `<=`, `>`, `>=`", "numbers of either kind; text, by its bytes"),
    ("`+`", "text, or numbers of one kind"),
    ("`-`, `*`, `/`", "numbers of one kind. What is too large for 64 bits stays at their end; `x / 0` is 0"),
    ("`%`", "whole numbers; `x % 0` is 0"),
    ("`a in [b, c]`", "whether one of a list is the same"),
    ("`\"a\" in request.headers`", "whether it is there; for cookies and arguments, too"),
];

/// The part of the manual that is made of the tables.
pub fn reference() -> String {
    let mut page = String::new();
    let cell = |text: &str| text.replace('|', "\\|");
    page.push_str("## Names\n\n| name | type | what it is |\n|---|---|---|\n");
    for Variable { name, kind, doc } in VARIABLES {
        // Writing to a string cannot fail.
        let _ = writeln!(page, "| `{name}` | {kind} | {} |", cell(doc));
    }
    page.push_str("\n## Operators\n\n| operator | of what |\n|---|---|\n");
    for (operator, of) in OPERATORS {
        let _ = writeln!(page, "| {} | {} |", cell(operator), cell(of));
    }
    page.push_str("\n## Functions\n\n| function | what it gives | an example that holds |\n|---|---|---|\n");
    for Function { form, doc, example, .. } in FUNCTIONS {
        let _ = writeln!(page, "| `{}` | {} | `{}` |", cell(form), cell(doc), cell(example));
    }
    page
}
