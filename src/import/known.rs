//! Directives that are not translated, and why: not needed, or without an equivalent.

use super::Fate;

/// The result for a directive that is not translated.
pub fn fate(name: &str) -> (Fate, &'static str) {
    let found = TABLE.iter().find(|(names, _, _)| {
        names.split(' ').any(|known| known.strip_suffix('*').map_or(known == name, |begin| name.starts_with(begin)))
    });
    match found {
        Some((_, fate, why)) => (*fate, why),
        None => (Fate::Lost, "Forebay knows no directive of this name"),
    }
}

use Fate::{BuiltIn, Lost};

const TABLE: &[(&str, Fate, &str)] = &[
    (
        "daemon pid master_process lock_file worker_priority worker_cpu_affinity timer_resolution working_directory",
        BuiltIn,
        "the unit of systemd says so",
    ),
    (
        "load_module debug_points pcre_jit env thread_pool google_perftools_profiles",
        BuiltIn,
        "there are no modules to load",
    ),
    ("events http stream server_tokens server_name_in_redirect", BuiltIn, ""),
    (
        "use multi_accept accept_mutex accept_mutex_delay worker_aio_requests debug_connection",
        BuiltIn,
        "the runtime decides it",
    ),
    (
        "worker_connections worker_rlimit_nofile worker_rlimit_core worker_shutdown_timeout",
        BuiltIn,
        "the hard limit of open files counts, and `server.open_files` shares it out",
    ),
    (
        "sendfile sendfile_max_chunk tcp_nopush tcp_nodelay aio aio_write directio directio_alignment output_buffers \
         postpone_output \
      read_ahead reset_timedout_connection lingering_*",
        BuiltIn,
        "Forebay sends as fast as the client reads, and loses no byte of an answer",
    ),
    (
        "types types_hash_* default_type variables_hash_* server_names_hash_* map_hash_* proxy_headers_hash_* \
         charset charset_types",
        BuiltIn,
        "types are those of the backend",
    ),
    ("open_file_cache* open_log_file_cache log_not_found log_subrequest", BuiltIn, "there are no files"),
    (
        "connection_pool_size request_pool_size subrequest_output_buffer_size client_body_in_* client_body_temp_path \
      proxy_temp_* proxy_busy_buffers_size proxy_buffer_size http2_chunk_size http2_recv_* client_header_buffer_size",
        BuiltIn,
        "buffers grow as they are needed, up to the limits of the file",
    ),
    (
        "keepalive_disable keepalive_min_timeout chunked_transfer_encoding etag if_modified_since max_ranges msie_*",
        BuiltIn,
        "what HTTP asks for is always so",
    ),
    (
        "ssl_session_cache ssl_session_timeout ssl_session_tickets ssl_session_ticket_key ssl_prefer_server_ciphers \
         ssl_ciphers ssl_dhparam \
      ssl_ecdh_curve ssl_buffer_size ssl_early_data ssl_conf_command",
        BuiltIn,
        "sessions are resumed by tickets whose keys change; groups and ciphers are Mozilla's intermediate profile: \
         see `tls`",
    ),
    (
        "ssl_stapling ssl_stapling_* ssl_trusted_certificate ssl_verify_depth ssl_ocsp*",
        Lost,
        "an OCSP answer comes from a file: `certificates[].staple`",
    ),
    (
        "proxy_http_version proxy_socket_keepalive proxy_ssl_session_reuse proxy_ssl_protocols proxy_ssl_ciphers",
        BuiltIn,
        "connections are kept, and the protocol is the upstream's",
    ),
    (
        "keepalive zone ntlm state sticky_cookie_insert",
        BuiltIn,
        "connections are kept, and all workers know all endpoints",
    ),
    ("real_ip_recursive", BuiltIn, "the first address from the right that is not a trusted proxy counts"),
    (
        "resolver resolver_timeout",
        BuiltIn,
        "names are looked up again when their TTL is over, by the system's resolver",
    ),
    ("error_log rewrite_log", BuiltIn, "errors go to standard error; FOREBAY_LOG says how much"),
    ("log_format", BuiltIn, "the log is JSON with the phases of each request, or `combined`"),
    ("absolute_redirect port_in_redirect", BuiltIn, "redirects name a path where the host stays the same"),
    (
        "http2_push http2_push_preload http2_idle_timeout http2_max_field_size http2_max_header_size \
         http2_max_requests",
        BuiltIn,
        "the limits of the listener hold for HTTP/2 as well",
    ),
    ("recursive_error_pages", BuiltIn, ""),
    (
        "http3* quic_* ssl_reject_handshake",
        Lost,
        "there is no HTTP/3; clients without a name that is known are refused anyway",
    ),
    (
        "root alias index autoindex* try_files disable_symlinks random_index dav_* create_full_put_path \
         min_delete_depth mp4* flv \
      image_filter* xslt_* empty_gif ssi* addition_types add_before_body add_after_body slice",
        Lost,
        "Forebay serves no files: put a server for files behind it, and name it as an upstream",
    ),
    (
        "fastcgi_*",
        Lost,
        "Forebay speaks HTTP to backends: have php-fpm behind a server of HTTP, such as FrankenPHP or nginx",
    ),
    ("uwsgi_*", Lost, "Forebay speaks HTTP to backends: start uWSGI with `--http-socket`"),
    ("scgi_* memcached_*", Lost, "Forebay speaks HTTP to backends"),
    (
        "gzip gzip_types gzip_min_length gzip_comp_level gzip_vary gzip_buffers gzip_http_version gzip_disable \
         brotli brotli_types brotli_min_length brotli_comp_level brotli_buffers brotli_window \
         zstd zstd_types zstd_min_length zstd_comp_level zstd_buffers gunzip gunzip_buffers",
        BuiltIn,
        "answers that are compressed say so in `Vary`; `compress` has its own limits",
    ),
    (
        "gzip* brotli* zstd*",
        Lost,
        "Forebay compresses by itself, and serves no files that were compressed before: see the filter `compress`",
    ),
    ("proxy_cache* proxy_no_cache proxy_store* proxy_force_ranges fastcgi_cache*", Lost, "there is no cache"),
    (
        "auth_basic* auth_request* auth_jwt* auth_delay satisfy",
        Lost,
        "a check that has no equivalent closes its place until you put one in, such as `jwt`, `basic_auth` or \
         `forward_auth`",
    ),
    (
        "secure_link* referer_* valid_referers userid* perl* js_* lua_* *_by_lua*",
        Lost,
        "a filter in Rust, or an expression in CEL, can do this: conf/manual/programming.md",
    ),
    ("error_page proxy_intercept_errors", Lost, "no request reaches it here: see the filter `error_page`"),
    (
        "sub_filter* substitutions_* subs_filter* charset_map override_charset source_charset",
        Lost,
        "the filter `body` changes text in answers",
    ),
    ("split_clients", Lost, "write `upstreams` with weights, or `when: hash(source.address) % 100 < 5`"),
    ("mirror mirror_request_body", Lost, "write `mirror: { upstream: … }` on the route"),
    ("stub_status status* vhost_traffic* req_status*", Lost, "the admin endpoint has `/metrics` and `/status`"),
    ("geoip* geoip2*", Lost, "there is no database of locations"),
    ("limit_conn*", Lost, "only connections of one address are limited: `limits.requests_per_ip`"),
    (
        "limit_req_dry_run limit_req_log_level limit_conn_log_level limit_conn_status limit_req_zone limit_conn_zone",
        BuiltIn,
        "",
    ),
    ("proxy_redirect", Lost, "`headers: { response: { set: { Location: { cel: … } } } }` can say it"),
    (
        "proxy_cookie_*",
        Lost,
        "`headers: { response: { set: { Set-Cookie: { cel: … } } } }` can say it, where there is one cookie",
    ),
    (
        "proxy_method proxy_set_body proxy_pass_request_* proxy_bind proxy_limit_rate proxy_ignore_headers \
         proxy_headers_hash",
        Lost,
        "requests and answers pass with all that they have",
    ),
    (
        "proxy_ignore_client_abort",
        Lost,
        "`client: { half_close: answer }` is as near as it gets: a client that is gone frees its backend",
    ),
    ("proxy_pass_header", BuiltIn, "all fields of an answer pass"),
    ("proxy_next_upstream_timeout", Lost, "`retry.per_try_timeout` and `deadline` say how long attempts may take"),
    ("postpone_gzipping internal server listen location upstream", BuiltIn, ""),
    ("queue health_check* match", Lost, "write `queue` and `health_check` of the upstream: conf/manual/health.md"),
    ("ssl_preread", BuiltIn, "names are read where `passthrough` asks for them"),
    (
        "proxy_timeout proxy_responses proxy_requests proxy_protocol_timeout preread_*",
        BuiltIn,
        "`tcp.idle` says how long neither side may be silent",
    ),
    (
        "limit_except if set rewrite return break map geo allow deny proxy_pass grpc_pass proxy_* grpc_* add_header \
         expires limit_req \
      client_* send_timeout limit_rate* ssl_* access_log large_client_header_buffers",
        Lost,
        "no request reaches it here, or it has no equivalent",
    ),
];
