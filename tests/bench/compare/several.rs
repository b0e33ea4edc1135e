//! The configurations of the proxies in front of several endpoints, one of which may fail.
//!
//! They are as equal as possible: the endpoint with the fewest active requests is selected, the time limits are half a
//! second to connect and one second for a response, and a failed GET (including a 500) is retried at another endpoint.
//! Forebay and HAProxy check their endpoints twice a second. nginx has no such checks, and by default excludes an
//! endpoint for ten seconds after a single failure.

use std::net::SocketAddr;
use std::path::Path;

use crate::moody::CHECKED;
use crate::proxies::{haproxy_frame, nginx_frame};

/// Forebay in front of `endpoints`. `upstream`: additional keys of the upstream, such as its policy.
pub fn forebay_config(address: SocketAddr, endpoints: &[SocketAddr], dir: &Path, upstream: Option<&str>) -> String {
    let endpoints: Vec<String> = endpoints.iter().map(|endpoint| format!("{{ address: \"{endpoint}\" }}")).collect();
    let upstream = upstream.map_or(String::new(), |keys| format!("    {keys}\n"));
    format!(
        "server: {{ threads: 1 }}
listeners: [ {{ name: web, address: \"{address}\" }} ]
upstreams:
  app:
    endpoints: [ {endpoints} ]
    timeouts: {{ connect: 500ms, wait: 1s }}
    health_check: {{ http: {{ path: {CHECKED} }}, interval: 500ms, timeout: 500ms, unhealthy_after: 2, healthy_after: 1 }}
{upstream}admin: {{ address: \"127.0.0.1:0\" }}
observability: {{ access_log: {{ path: \"{log}\" }} }}
routes:
  - {{ name: all, upstream: app, retry: {{ on: [connect_error, reset, timeout, 500] }} }}
",
        endpoints = endpoints.join(", "),
        log = dir.join("access.log").display(),
    )
}

/// `nginx` in front of `endpoints`.
pub fn nginx_config(address: SocketAddr, endpoints: &[SocketAddr], dir: &Path) -> String {
    let servers: String = endpoints.iter().map(|endpoint| format!("        server {endpoint};\n")).collect();
    let http = format!(
        "    access_log {log};
    upstream app {{
        least_conn;
{servers}        keepalive 1024;
        keepalive_requests 1000000000;
    }}
    server {{
        listen {address} backlog=4096;
        location / {{
            proxy_pass http://app;
            proxy_http_version 1.1;
            proxy_set_header Connection \"\";
            proxy_set_header Host $http_host;
            proxy_set_header X-Forwarded-For $proxy_add_x_forwarded_for;
            proxy_set_header X-Forwarded-Proto $scheme;
            proxy_connect_timeout 500ms;
            proxy_read_timeout 1s;
            proxy_next_upstream error timeout http_500;
        }}
    }}
",
        log = dir.join("access.log").display()
    );
    nginx_frame(dir, &http)
}

/// HAProxy in front of `endpoints`.
pub fn haproxy_config(address: SocketAddr, endpoints: &[SocketAddr]) -> String {
    let server = |(number, endpoint): (usize, &SocketAddr)| format!("    server s{number} {endpoint}\n");
    let servers: String = endpoints.iter().enumerate().map(server).collect();
    let app = format!(
        "backend app
    balance leastconn
    option redispatch 1
    retries 3
    retry-on conn-failure empty-response response-timeout 500
    option httpchk GET {CHECKED}
    default-server check inter 500ms fall 2 rise 1 observe layer7
{servers}"
    );
    haproxy_frame(address, None, ("500ms", "1s"), "", &app)
}
