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
        default: "everyone's",
        keys: &[],
    },
    Row {
        fields: "Connection",
        effect: "`close` ends the connection after the answer; the fields that it names are removed before routes and filters see the request",
        default: "everyone's; 400 if it names `Host`, the framing or what only proxies say, or more than 16 fields",
        keys: &[],
    },
    Row {
        fields: "Content-Length",
        effect: "a body that is longer than is allowed is refused before it comes; one that is longer than can be held is held until more has come than can be",
        default: "everyone's",
        keys: &["routes.buffering.request"],
    },
    Row {
        fields: "Content-Type",
        effect: "`application/grpc` in a POST with `TE: trailers` over HTTP/2: neither body is held back and `min_rate.read` does not count; all other limits of time hold; `application/grpc-web` in a POST becomes gRPC where the route bridges it",
        default: "everyone's, where the upstream is asked over HTTP/2",
        keys: &["routes.grpc", "routes.grpc_web", "upstreams.protocol"],
    },
    Row {
        fields: "Expect",
        effect: "`100-continue` is answered when the body is wanted; where bodies are streamed, by the endpoint",
        default: "everyone's",
        keys: &["routes.buffering.request"],
    },
    Row {
        fields: "Forwarded, X-Forwarded-For",
        effect: "who the client is: for the log, `access`, limits and keys by address, and the endpoint; read from the right, up to the first that is not trusted",
        default: "only of trusted proxies; of others they are removed",
        keys: &["trusted_proxies", "forwarded"],
    },
    Row {
        fields: "grpc-timeout",
        effect: "a gRPC call has less time; never more",
        default: "everyone's, where gRPC is",
        keys: &["routes.grpc", "routes.deadline"],
    },
    Row {
        fields: "Host",
        effect: "the route",
        default: "everyone's; once, well-formed and equal to the authority of the target",
        keys: &["routes.match.hosts"],
    },
    Row {
        fields: "HTTP2-Settings, Keep-Alive, Proxy-Authenticate, Proxy-Authorization, Proxy-Connection",
        effect: "none: they are removed before routes and filters see the request",
        default: "everyone's",
        keys: &[],
    },
    Row {
        fields: "Proxy",
        effect: "none: it is removed, for CGI programs take it for the proxy that they are to use",
        default: "from no client",
        keys: &[],
    },
    Row {
        fields: "TE",
        effect: "`trailers` makes a gRPC call possible; other codings are removed",
        default: "everyone's",
        keys: &[],
    },
    Row {
        fields: "traceparent, tracestate",
        effect: "the trace that an exchange belongs to, and whether it is recorded",
        default: "only of trusted proxies; of others they are replaced where spans are made, and pass where none are",
        keys: &["observability.tracing.parent"],
    },
    Row {
        fields: "Transfer-Encoding",
        effect: "`chunked`: a body of unknown length, held like any other; anything else is refused",
        default: "everyone's, over HTTP/1.1",
        keys: &["routes.buffering.request"],
    },
    Row {
        fields: "Upgrade",
        effect: "one protocol besides HTTP, over HTTP/1.1, without a body and with `Connection: upgrade`: passes to the endpoint where the route allows it. Once it has answered 101, nothing is held back and no limit of time holds but those of silence; until then, and with any other answer, all do",
        default: "`websocket` of everyone, where the upstream is asked over HTTP/1",
        keys: &["routes.upgrades", "upstreams.protocol"],
    },
    Row {
        fields: "X-Client-Cert-*",
        effect: "who a client has proved to be by its certificate: Forebay sets them where it has asked for one",
        default: "only of trusted proxies; of others they are removed",
        keys: &["trusted_proxies", "listeners.tls.certificates.client"],
    },
    Row {
        fields: "X-Forebay-*",
        effect: "what Forebay says to endpoints, such as `X-Forebay-Mirror`",
        default: "only of trusted proxies; of others they are removed",
        keys: &["trusted_proxies"],
    },
    Row {
        fields: "X-Forwarded-*, X-Real-IP, X-Client-IP, Client-IP, True-Client-IP, X-Cluster-Client-IP, CF-Connecting-IP, CF-Connecting-IPv6, Fastly-Client-IP, X-Original-Forwarded-For, X-Original-Host, X-Original-URL, X-Rewrite-URL",
        effect: "scheme, host and port that the endpoint receives, and what applications take for the client or the path",
        default: "only of trusted proxies; of others they are removed",
        keys: &["trusted_proxies"],
    },
    Row {
        fields: "X-Request-Id",
        effect: "the id in the log and at the endpoint, where a filter makes one",
        default: "from no client: a new one is made",
        keys: &["routes.filters.request_id.trust"],
    },
    Row {
        fields: "any whose name has more than letters, digits and hyphens",
        effect: "none: it is removed, for `X_Forwarded_For` is `X-Forwarded-For` to many backends",
        default: "from no client",
        keys: &["listeners.odd_header_names"],
    },
];

/// The table in Markdown, for the manual.
pub fn markdown() -> String {
    let mut text = "| field | what it changes | of whom it is taken | keys |\n|---|---|---|---|\n".to_owned();
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
