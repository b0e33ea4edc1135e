//! The table of request header fields by which a client influences the treatment of its request, with the effect of
//! each.
//!
//! A client can write any field. A field must therefore not disable a protection unless the configuration of a route or
//! an upstream allows it. `conf/manual/security.md` shows this table, and a test checks each row.

/// One field, or several with the same effect.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Row {
    /// The names of the fields.
    pub fields: &'static str,
    /// The effect that a client can have.
    pub effect: &'static str,
    /// From which clients the fields are accepted, and where, by default.
    pub default: &'static str,
    /// The configuration keys that change the default; empty if there is none.
    pub keys: &'static [&'static str],
}

/// All fields with a fixed effect. Fields that routes, filters, keys and cookies use are chosen in the configuration.
pub static TABLE: &[Row] = &[
    Row {
        fields: "Accept",
        effect: "a refusal is JSON instead of text if it names `application/json`",
        default: "any client's",
        keys: &[],
    },
    Row {
        fields: "Connection",
        effect: "`close` ends the connection after the response; the fields that it names are removed before routes and filters see the request",
        default: "any client's; 400 if it names `Host`, a framing field or a field that only proxies may set, or more than 16 fields",
        keys: &[],
    },
    Row {
        fields: "Content-Length",
        effect: "a body over the limit is refused before it is read; a body that does not fit into the buffers is buffered until they are full",
        default: "any client's",
        keys: &["routes.buffering.request"],
    },
    Row {
        fields: "Content-Type",
        effect: "`application/grpc` in a POST with `TE: trailers` over HTTP/2: neither body is buffered and `min_rate.read` does not apply; all other time limits do; `application/grpc-web` in a POST is translated to gRPC where the route bridges it",
        default: "any client's, where the upstream uses HTTP/2",
        keys: &["routes.grpc", "routes.grpc_web", "upstreams.protocol"],
    },
    Row {
        fields: "Expect",
        effect: "`100-continue` is answered when Forebay reads the body; where bodies are streamed, the endpoint answers it",
        default: "any client's",
        keys: &["routes.buffering.request"],
    },
    Row {
        fields: "Forwarded, X-Forwarded-For",
        effect: "the client's address: for the log, `access`, limits and keys by address, and the endpoint; read from the right, up to the first address that is not trusted",
        default: "only from trusted proxies; removed from other requests",
        keys: &["trusted_proxies", "forwarded"],
    },
    Row {
        fields: "grpc-timeout",
        effect: "shortens the time of a gRPC call; never extends it",
        default: "any client's, where the route allows gRPC",
        keys: &["routes.grpc", "routes.deadline"],
    },
    Row {
        fields: "Host",
        effect: "the route",
        default: "any client's; exactly one, well-formed and equal to the authority of the target",
        keys: &["routes.match.hosts"],
    },
    Row {
        fields: "HTTP2-Settings, Keep-Alive, Proxy-Authenticate, Proxy-Authorization, Proxy-Connection",
        effect: "none: they are removed before routes and filters see the request",
        default: "any client's",
        keys: &[],
    },
    Row {
        fields: "Proxy",
        effect: "none: it is removed, because CGI programs would use its value as their proxy",
        default: "from no client",
        keys: &[],
    },
    Row {
        fields: "TE",
        effect: "`trailers` makes a gRPC call possible; other codings are removed",
        default: "any client's",
        keys: &[],
    },
    Row {
        fields: "traceparent, tracestate",
        effect: "the trace of the exchange, and whether it is recorded",
        default: "only from trusted proxies; others' fields are replaced where spans are made, and pass unchanged elsewhere",
        keys: &["observability.tracing.parent"],
    },
    Row {
        fields: "Transfer-Encoding",
        effect: "`chunked`: a body of unknown length, buffered like any other; every other coding is refused",
        default: "any client's, over HTTP/1.1",
        keys: &["routes.buffering.request"],
    },
    Row {
        fields: "Upgrade",
        effect: "one protocol besides HTTP, over HTTP/1.1, without a body and with `Connection: upgrade`: passes to the endpoint where the route allows it. After a 101 response nothing is buffered and only the idle limits apply; before it, and after any other response, all limits apply",
        default: "any client's `websocket`, where the upstream uses HTTP/1",
        keys: &["routes.upgrades", "upstreams.protocol"],
    },
    Row {
        fields: "X-Client-Cert-*",
        effect: "the identity in the client's certificate; Forebay sets these fields where it requires or accepts one",
        default: "only from trusted proxies; removed from other requests",
        keys: &["trusted_proxies", "listeners.tls.certificates.client"],
    },
    Row {
        fields: "X-Forebay-*",
        effect: "information from Forebay to endpoints, such as `X-Forebay-Mirror`",
        default: "only from trusted proxies; removed from other requests",
        keys: &["trusted_proxies"],
    },
    Row {
        fields: "X-Forwarded-*, X-Real-IP, X-Client-IP, Client-IP, True-Client-IP, X-Cluster-Client-IP, CF-Connecting-IP, CF-Connecting-IPv6, Fastly-Client-IP, X-Original-Forwarded-For, X-Original-Host, X-Original-URL, X-Rewrite-URL",
        effect: "scheme, host and port that the endpoint receives, and what applications take for the client's address or the path",
        default: "only from trusted proxies; removed from other requests",
        keys: &["trusted_proxies"],
    },
    Row {
        fields: "X-Request-Id",
        effect: "the id in the log and at the endpoint, where a filter makes one",
        default: "from no client: a new one is made",
        keys: &["routes.filters.request_id.trust"],
    },
    Row {
        fields: "any whose name has other characters than letters, digits and hyphens",
        effect: "none: it is removed, because many backends read `X_Forwarded_For` as `X-Forwarded-For`",
        default: "from no client",
        keys: &["listeners.odd_header_names"],
    },
];

/// The table in Markdown, for the manual.
pub fn markdown() -> String {
    let mut text = "| field | effect | accepted from | keys |\n|---|---|---|---|\n".to_owned();
    for Row { fields, effect, default, keys } in TABLE {
        let fields: Vec<_> = match fields.split_once("any whose") {
            Some(_) => vec![(*fields).to_owned()],
            None => fields.split(", ").map(|field| format!("`{field}`")).collect(),
        };
        let keys: Vec<_> = keys.iter().map(|key| format!("`{key}`")).collect();
        text.push_str(&format!("| {} | {effect} | {default} | {} |\n", fields.join(", "), keys.join(", ")));
    }
    text
}
