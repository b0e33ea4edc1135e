//! Configuration files: more than 40 invalid ones with their reports, and the two valid ones in `conf/`.
//!
//! An invalid file is `config/wrong/<what is wrong>.yaml`; its report is in the `.snap` file next to it.

use std::collections::BTreeSet;
use std::fs;
use std::path::Path;
use std::sync::Arc;

use forebay::config::filter::{Settings, decode};
use forebay::config::units::{ByteRate, Size};
use forebay::config::{Config, FilterKind, schema};
use forebay::error::BuildError;
use forebay::filter::Surroundings;
use forebay::filter::call::{Answered, Call, CallError, Callees, Caller, Calls};
use rustix::fs::{CWD, FileType, Mode, mknodat};
use schemars::JsonSchema;
use serde::Deserialize;
use serde_json::Value as Json;

/// A filter with one of each: a required setting, one with a unit, and one that explains itself.
#[derive(Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
#[expect(dead_code, reason = "only decoded")]
struct Tag {
    value: String,
    #[serde(default)]
    size: Option<Size>,
    #[serde(default)]
    letter: Option<char>,
}

#[derive(Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
struct Answer {}

fn kinds() -> Vec<FilterKind> {
    vec![
        FilterKind {
            key: "tag",
            answers: false,
            decode: |value| decode::<Tag>(&value).map(|tag| Arc::new(tag) as Settings),
            schema: Tag::json_schema,
        },
        FilterKind {
            key: "answer",
            answers: true,
            decode: |value| decode::<Answer>(&value).map(|answer| Arc::new(answer) as Settings),
            schema: Answer::json_schema,
        },
    ]
}

fn parse(text: &str) -> Config {
    Config::parse("forebay.yaml", text, &kinds()).unwrap()
}

/// Compares the report of an invalid file with the reviewed one.
fn assert_said_of(case: &str) {
    let text = fs::read_to_string(format!("tests/it/config/wrong/{case}.yaml")).unwrap();
    let said = match Config::parse("forebay.yaml", &text, &kinds()) {
        Ok(config) => config.warnings().to_string(),
        Err(report) => report.to_string(),
    };
    assert!(!said.contains("\u{1b}"));
    let mut settings = insta::Settings::clone_current();
    settings.set_snapshot_path("config/wrong");
    settings.set_prepend_module_to_snapshot(false);
    settings.set_omit_expression(true);
    settings.bind(|| insta::assert_snapshot!(case, said));
}

macro_rules! wrong {
    ($($case:ident)*) => {
        const WRONG: &[&str] = &[$(stringify!($case)),*];

        mod wrong {
            $(
                #[test]
                fn $case() {
                    super::assert_said_of(stringify!($case));
                }
            )*
        }
    };
}

wrong! {
    a_tab_cannot_indent
    a_quote_that_is_never_closed
    a_colon_too_many
    an_indentation_that_fits_nothing
    a_list_that_is_never_closed
    a_variable_in_a_flow_map_needs_quotes
    an_anchor_that_there_is_not
    keys_that_stand_twice
    keys_that_are_no_text
    a_number_that_is_too_large
    a_control_character
    two_documents
    an_empty_file
    a_list_where_the_file_must_be_a_map
    a_merge_of_no_map
    a_yaml_tag
    an_unknown_key_at_the_top
    unknown_keys_further_in
    a_key_that_a_later_version_may_know
    missing_keys
    mirrors_that_are_none
    neither_listeners_nor_routes
    a_map_where_a_list_is_expected
    values_of_the_wrong_type
    a_bare_number_is_no_time_and_no_size
    an_unknown_policy
    hash_keys_that_are_missing_or_idle
    health_checks_that_are_none
    grpc_web_without_http_2
    outliers_and_tiers_that_are_none
    spans_that_can_go_nowhere
    spans_that_would_go_over_tls
    cookies_that_anybody_could_sign
    limits_and_queues_that_are_none
    circuit_breakers_that_break_nothing
    an_unknown_protocol
    tls_that_cannot_be_meant
    windows_of_http_2_that_are_none
    sources_of_endpoints_that_are_none
    version_2
    addresses_that_are_none
    networks_that_are_none
    limits_out_of_range
    disk_threads_and_a_disk_queue_that_are_none
    actions_that_are_none
    no_action_at_all
    resources_too_small_to_work_with
    a_body_that_may_take_more_than_all_of_them
    buffering_without_room
    a_client_without_time
    rates_that_are_none
    retries_that_are_none
    buffering_of_a_route_that_asks_no_upstream
    a_variable_that_is_not_set
    a_variable_that_is_required
    a_secret_file_that_is_missing
    a_variable_that_is_misspelt
    secrets_are_not_printed
    two_of_one_name
    two_of_one_address
    names_that_are_none
    names_that_look_like_paths
    an_unknown_upstream
    a_route_that_leads_nowhere_or_to_too_much
    an_unreachable_route
    a_match_that_matches_nothing
    an_upgrade_that_is_none
    conditions_that_are_none
    a_regular_expression_that_is_none
    an_unknown_filter
    filters_that_are_no_maps_of_one_key
    wrong_settings_of_filters
    an_error_inside_of_an_anchor
    many_errors_at_once
    warnings_alone_refuse_no_file
}

#[test]
fn routes_are_needed_where_requests_come_and_nowhere_else() {
    let read = |listeners: &str, routes: &str| {
        let upstreams = "upstreams: { app: { endpoints: [ { address: 127.0.0.1:3000 } ] } }";
        Config::parse("forebay.yaml", &format!("listeners: [ {listeners} ]\n{upstreams}\n{routes}"), &kinds())
    };
    for without in
        ["tcp: { upstream: app }", "redirect_https: true", "passthrough: [ { sni: [db.example.com], upstream: app } ]"]
    {
        let listener = format!("{{ name: one, address: 127.0.0.1:1, {without} }}");
        for routes in ["", "routes: []\n"] {
            assert!(read(&listener, routes).is_ok_and(|config| config.routes.is_empty()), "{without}");
            let both = format!("{listener}, {{ name: web, address: 127.0.0.1:2 }}");
            let refused = read(&both, routes).expect_err("requests come to one of them").to_string();
            assert!(refused.contains("there are no routes, so every request would be refused"), "{refused}");
        }
    }
}

#[test]
fn every_wrong_file_is_looked_at() {
    let files = fs::read_dir("tests/it/config/wrong").unwrap().map(|entry| entry.unwrap().path());
    let files = files.filter(|path| path.extension().is_some_and(|extension| extension == "yaml"));
    let files: BTreeSet<_> = files.map(|path| path.file_stem().unwrap().to_str().unwrap().to_owned()).collect();
    assert_eq!(files, WRONG.iter().map(|case| (*case).to_owned()).collect());
    assert!(WRONG.len() >= 40);
}

/// The report of a file with these bytes.
fn said_of_bytes(bytes: &[u8]) -> String {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("forebay.yaml");
    fs::write(&path, bytes).unwrap();
    let said = Config::load(&path, &kinds()).unwrap_err().to_string();
    said.replace(&format!("{}/", folder.path().display()), "")
}

#[test]
fn a_file_that_is_not_utf_8() {
    insta::assert_snapshot!(said_of_bytes(b"listeners:\n  - name: caf\xe9\n"), @r"
    error: the file is not UTF-8 text
     --> forebay.yaml:2:14
      |
    2 |   - name: caf�
      |              ^ the byte 0xe9 belongs to no character
      |
      = help: save the file in the encoding UTF-8

    error: 1 error in forebay.yaml
    ");
}

#[test]
fn a_file_that_is_too_large() {
    insta::assert_snapshot!(said_of_bytes(&vec![b'#'; 17 * 1024 * 1024]), @r"
    error: the file is larger than 16MiB
    --> forebay.yaml
     = help: is it a configuration?

    error: 1 error in forebay.yaml
    ");
}

#[test]
fn a_file_that_is_not_there() {
    insta::assert_snapshot!(Config::load(Path::new("no/such.yaml"), &kinds()).unwrap_err(), @r"
    error: the file cannot be read: no such file or directory
    --> no/such.yaml
     = help: name another file, or make this one

    error: 1 error in no/such.yaml
    ");
}

#[test]
fn a_folder_is_no_file() {
    insta::assert_snapshot!(Config::load(Path::new("tests"), &kinds()).unwrap_err(), @r"
    error: the file cannot be read: it is a directory and not a plain file
    --> tests
     = help: it must be a file of text

    error: 1 error in tests
    ");
}

#[test]
fn a_named_pipe_is_no_file_and_not_waited_for() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("forebay.yaml");
    mknodat(CWD, &path, FileType::Fifo, Mode::RUSR | Mode::WUSR, 0).unwrap();
    let said = Config::load(&path, &kinds()).unwrap_err().to_string();
    assert!(said.contains("the file cannot be read: it is a named pipe and not a plain file"), "{said}");
}

#[test]
fn a_file_that_nests_too_deeply_is_refused_in_one_pass() {
    for text in ["[".repeat(1 << 20), format!("listeners: {}", "{a: [".repeat(1 << 17)), "- ".repeat(1 << 19)] {
        let said = said_of_bytes(text.as_bytes());
        assert!(
            said.contains("error: lists and maps are nested in more than 128 levels\n --> forebay.yaml:1:"),
            "{said}"
        );
    }
}

#[test]
fn a_file_whose_aliases_stand_for_too_much_is_refused() {
    let ten = |name: &str, of: &str| format!("{name}: &{name} [{}]\n", [of; 10].join(","));
    let bomb = ["a1", "b*a", "c*b", "d*c", "e*d", "f*e"].map(|step| ten(&step[..1], &step[1..])).concat();
    insta::assert_snapshot!(said_of_bytes(bomb.as_bytes()), @r"
    error: with aliases expanded, the file has more than 100000 values
     --> forebay.yaml:5:35
      |
    5 | e: &e [*d,*d,*d,*d,*d,*d,*d,*d,*d,*d]
      |                                   ^^ from here on it is too much

    error: 1 error in forebay.yaml
    ");
    insta::assert_snapshot!(said_of_bytes(b"a: &a [1, *a]\n"), @r"
    error: an alias is inside the value of its own anchor
     --> forebay.yaml:1:11
      |
    1 | a: &a [1, *a]
      |           ^^ this never ends

    error: 1 error in forebay.yaml
    ");
}

#[test]
fn an_upstream_may_have_dots_in_its_name() {
    let config = parse(
        "listeners: [ { name: web, address: 127.0.0.1:8080 } ]\nupstreams: { my.app: { dns: { name: localhost, port: 3000 } } }\n\
         routes: [ { name: all, upstream: my.app } ]\n",
    );
    assert!(config.upstreams["my.app"].dns.is_some());
    assert!(config.warnings().is_empty(), "{}", config.warnings());
}

const RIGHT: &str = "\
listeners:
  - name: web
    address: 127.0.0.1:8080
upstreams:
  app: { endpoints: [ { address: 127.0.0.1:3000 } ] }
routes:
  - name: all
    upstream: app
    match: { hosts: [Shop.Example.com], headers: { x-key: \"${CARGO_PKG_NAME}\" } }
    filters:
      - tag: { value: \"${CARGO_PKG_NAME}\" }
";

#[test]
fn an_error_of_the_build_is_shown_at_its_place() {
    let errors = [
        BuildError::new("routes[0].match.hosts[0]", "no request can name this host: take it out"),
        BuildError::new("upstreams.app.endpoints[0].address", "the host `127.0.0.1` is down"),
        BuildError::new("admin.address", "no such address: choose another"),
    ];
    insta::assert_snapshot!(parse(RIGHT).report(&errors), @r#"
    error: `admin.address`: no such address
    --> forebay.yaml
     = help: choose another

    error: the host `127.0.0.1` is down
     --> forebay.yaml:5:34
      |
    5 |   app: { endpoints: [ { address: 127.0.0.1:3000 } ] }
      |                                  ^^^^^^^^^^^^^^

    error: no request can name this host
     --> forebay.yaml:9:22
      |
    9 |     match: { hosts: [Shop.Example.com], headers: { x-key: "${CARGO_PKG_NAME}" } }
      |                      ^^^^^^^^^^^^^^^^ take it out

    error: 3 errors in forebay.yaml
    "#);
}

#[test]
fn an_error_of_the_build_tells_no_secret() {
    let secret = env!("CARGO_PKG_NAME");
    let at = "routes[0].filters[0].tag";
    let errors = [
        BuildError::new(format!("{at}.value"), format!("`{secret}` is no tag: write another")),
        BuildError::new(at, format!("cannot resolve {}", &secret[..5])),
        BuildError::new("routes[0]", format!("{secret} is wrong")),
    ];
    let said = parse(RIGHT).report(&errors).to_string();
    assert!(said.contains("error: `${CARGO_PKG_NAME}` is no tag"), "{said}");
    assert_eq!(said.matches("error: the value of `${CARGO_PKG_NAME}` does not fit here").count(), 2, "{said}");
    assert!(!said.replace("forebay.yaml", "").contains(&secret[..5]), "{said}");
}

#[test]
fn nothing_that_is_printed_for_debugging_holds_a_secret() {
    let config = parse(RIGHT);
    let printed = format!("{config:?} {:?}", config.routes).replace("forebay.yaml", "");
    assert!(!printed.contains(env!("CARGO_PKG_NAME")), "{printed}");
}

proptest::proptest! {
    #![proptest_config(proptest::prelude::ProptestConfig { cases: 200, failure_persistence: None, ..Default::default() })]

    /// Arbitrary input gives a report that can be printed.
    #[test]
    fn no_file_brings_the_reader_down(from in 0usize..5000, length in 0usize..40, typed in "[ -~\n\tä\u{feff}]{0,6}|[{}\\[\\]:,&*!|>'\"%@`#<-]{0,4}") {
        let mut chars: Vec<char> = fs::read_to_string("conf/full.yaml").unwrap().chars().collect();
        let from = from % chars.len();
        let to = (from + length).min(chars.len());
        chars.splice(from..to, typed.chars());
        let text: String = chars.into_iter().collect();
        if let Err(report) = Config::parse("full.yaml", &text, &shipped()) {
            assert!(report.to_string().contains("full.yaml"));
        }
    }
}

#[test]
fn hosts_are_lower_cased() {
    assert_eq!(parse(RIGHT).routes[0].matches.hosts, ["shop.example.com"]);
}

// The files of `conf/`.

/// Upstreams that filters may refer to; they have no servers.
struct Upstreams<'n>(Vec<&'n str>);

struct Nobody;

#[async_trait::async_trait]
impl Calls for Nobody {
    async fn send(&self, _: Call) -> Result<Answered, CallError> {
        Err(CallError::NoEndpoint)
    }
}

impl Callees for Upstreams<'_> {
    fn caller(&self, upstream: &str, _: &str) -> Option<Caller> {
        self.0.contains(&upstream).then(|| Caller::new(Arc::new(Nobody)))
    }

    fn names(&self) -> Vec<&str> {
        self.0.clone()
    }
}

/// The filters that `conf/full.yaml` shows.
fn shipped() -> Vec<FilterKind> {
    forebay::filter::Catalog::builtin().kinds().to_vec()
}

#[test]
fn what_full_yaml_shows_can_be_built() {
    let (config, _) = shipped_file("full.yaml");
    let dir = tempfile::tempdir().unwrap();
    let key = r#"{"keys":[{"kty":"oct","k":"AyM1SysPpbyDfgZld3umj1qzKObwVMkoqQ-EstJQLr_T"}]}"#;
    for (file, text) in [
        ("blocked.txt", "192.0.2.7"),
        ("users.htpasswd", "ada:$2b$04$NSVZohxgRPqCbGvPPBsZ2eTV7ov/7NXV8xzCnRBdxJMN.OtQAfoCC"),
        ("keys.txt", "shop:2bb80d537b1da3e38bd30361aa855686bde0eacd7162fef6a25fe97bf527a25b"),
        ("jwks.json", key),
        ("error.html", "<p>{{ response.code }}"),
        ("error.json", "{ \"status\": {{ response.code }} }"),
        ("error.txt", "{{ response.message }}"),
    ] {
        fs::write(dir.path().join(file), text).unwrap();
    }
    let upstreams = Upstreams(config.upstreams.keys().map(String::as_str).collect());
    let mut around = Surroundings::rehearsal(&upstreams);
    around.directory = dir.path();
    for (index, route) in config.routes.iter().enumerate() {
        let chain = forebay::filter::Catalog::builtin().chain_in(&route.filters, &around);
        let errors: Vec<BuildError> = chain.err().unwrap_or_default();
        let errors: Vec<_> = errors.into_iter().map(|error| error.under(&format!("routes[{index}].filters"))).collect();
        assert!(errors.is_empty(), "{}", config.report(&errors));
    }
}

fn shipped_file(name: &str) -> (Config, Json) {
    let text = fs::read_to_string(format!("conf/{name}")).unwrap();
    let config = Config::parse(name, &text, &shipped()).unwrap();
    assert!(config.warnings().is_empty(), "{}", config.warnings());
    let mut written: serde_yaml::Value = serde_yaml::from_str(&text).unwrap();
    written.apply_merge().unwrap();
    (config, serde_json::to_value(written).unwrap())
}

#[test]
fn a_default_that_is_larger_than_all_resources_is_nobodys_error() {
    let config = parse(&format!("{RIGHT}resources: {{ memory: 1MiB, disk: 0B }}\n"));
    assert!(config.warnings().is_empty(), "{}", config.warnings());
    assert!(config.routes[0].buffering.request.disk > config.resources.disk);
}

#[test]
fn a_rate_is_limited_from_the_first_byte_unless_told_otherwise() {
    let config = parse(&format!("{RIGHT}    client: {{ limit_rate: {{ rate: 1MiB/s }} }}\n"));
    let limit = config.routes[0].client.limit_rate.as_ref().unwrap();
    assert_eq!((limit.rate, limit.after), (ByteRate(1 << 20), Size(0)));
    assert!(parse(RIGHT).routes[0].client.limit_rate.is_none());
}

#[test]
fn the_smallest_file_is_small() {
    let text = fs::read_to_string("conf/forebay.yaml").unwrap();
    assert!(text.lines().count() < 12);
}

#[test]
fn the_schema_takes_what_is_right_and_refuses_what_is_wrong() {
    let schema = jsonschema::validator_for(&schema(&shipped())).unwrap();
    for name in ["forebay.yaml", "full.yaml"] {
        let errors: Vec<_> = schema.iter_errors(&shipped_file(name).1).map(|error| error.to_string()).collect();
        assert!(errors.is_empty(), "{name}: {errors:#?}");
    }
    let (_, right) = shipped_file("forebay.yaml");
    let with = |path: &str, value: Json| {
        let mut changed = right.clone();
        let (map, key) = path.rsplit_once('/').unwrap();
        changed.pointer_mut(map).unwrap()[key] = value;
        schema.is_valid(&changed)
    };
    assert!(with("/listeners/0/limits", serde_json::json!({ "headers": "${HEADERS:-100}" })));
    assert!(with("/listeners/0/protocols", serde_json::json!(["${PROTOCOL}", "h2c"])));
    assert!(with("/via", "${VIA}".into()) && with("/server", serde_json::json!({ "threads": "${THREADS}" })));
    assert!(!with("/via", "maybe".into()));
    assert!(!with("/colour", "blue".into()));
    assert!(!with("/listeners/0/adress", "127.0.0.1:80".into()));
    assert!(!with("/listeners/0/address", "127.0.0.1".into()));
    assert!(!with("/listeners/0/protocols", serde_json::json!(["http3"])));
    assert!(!with("/routes/0/filters", serde_json::json!([{ "tag": {} }])));
    assert!(!with("/routes/0/filters", serde_json::json!([{ "respond": {}, "redirect": {} }])));
    assert!(!with("/routes/0/match", serde_json::json!({ "path": "/api" })));
    assert!(with("/routes/0/client", serde_json::json!({ "limit_rate": { "rate": "1.5MiB/s" } })));
    assert!(!with("/routes/0/client", serde_json::json!({ "limit_rate": { "rate": "1MiB" } })));
    assert!(!with("/routes/0/client", serde_json::json!({ "limit_rate": { "after": "1MiB" } })));
    assert!(!with("/resources", serde_json::json!({ "on_pressure": ["panic"] })));
    assert!(!with("/routes/0/match", serde_json::json!({ "headers": { "x": { "regex": "a", "colour": 1 } } })));
}

#[test]
fn every_file_names_the_schema_that_is_shipped() {
    let examples = fs::read_dir("conf/examples").unwrap().map(|entry| entry.unwrap().path());
    let examples: Vec<_> =
        examples.filter(|path| path.extension().is_some_and(|extension| extension == "yaml")).collect();
    let others = ["forebay.yaml", "full.yaml", "packaging/forebay.yaml", "packaging/container.yaml"];
    let mut count = 0;
    for path in others.iter().map(|name| Path::new("conf").join(name)).chain(examples) {
        let text = fs::read_to_string(&path).unwrap();
        let named = text.lines().next().and_then(|line| line.strip_prefix("# yaml-language-server: $schema="));
        let named = named.unwrap_or_else(|| panic!("{} names no schema", path.display()));
        match named.strip_prefix("/usr/share/forebay/") {
            // The path in the package.
            Some(name) => assert_eq!(name, "forebay.schema.json", "{}", path.display()),
            None => assert!(path.with_file_name(named).is_file(), "{} names {named}", path.display()),
        }
        count += 1;
    }
    assert!(count > 30);
    let made = format!("{:#}\n", forebay::gateway::Gateway::builder().schema());
    let path = "conf/forebay.schema.json";
    if std::env::var_os("UPDATE_MANUAL").is_some() {
        fs::write(path, &made).unwrap();
    }
    let there = fs::read_to_string(path).unwrap_or_default();
    assert!(there == made, "{path} is out of step; `UPDATE_MANUAL=1` with this test writes it anew");
}

#[test]
fn every_key_of_the_schema_has_a_description() {
    let schema = schema(&shipped());
    let mut missing = Vec::new();
    undescribed(&schema, &schema, "", &mut missing);
    assert!(missing.is_empty(), "an editor has nothing to say of {missing:#?}");
}

/// Collects the keys without a description, neither of the key nor of its type.
fn undescribed(root: &Json, schema: &Json, path: &str, missing: &mut Vec<String>) {
    let described = |entry: &Json| {
        let of_type = entry["$ref"].as_str().and_then(|name| root.pointer(name.trim_start_matches('#')));
        entry["description"].is_string() || of_type.is_some_and(|of_type| of_type["description"].is_string())
    };
    match schema {
        Json::Object(node) => {
            for (key, inner) in node {
                let path = format!("{path}/{key}");
                let entries = inner.as_object().filter(|_| key == "properties").into_iter().flatten();
                missing
                    .extend(entries.filter(|(_, entry)| !described(entry)).map(|(name, _)| format!("{path}/{name}")));
                undescribed(root, inner, &path, missing);
            }
        }
        Json::Array(items) => {
            items.iter().enumerate().for_each(|(at, item)| undescribed(root, item, &format!("{path}/{at}"), missing));
        }
        _ => {}
    }
}

#[test]
fn full_yaml_shows_every_key_of_the_schema() {
    let schema = schema(&shipped());
    let (_, full) = shipped_file("full.yaml");
    let mut missing = Vec::new();
    every_key_is_shown(&schema, &[&schema], &[&full], "", &mut missing);
    // The same keys as those of a listener, which are shown there.
    missing.retain(|path: &String| !path.starts_with(".admin.tls."));
    assert!(missing.is_empty(), "full.yaml does not show {missing:?}");
}

/// Walks the schema together with all values it applies to; a key counts as shown if one of them has it.
fn every_key_is_shown(root: &Json, schemas: &[&Json], values: &[&Json], path: &str, missing: &mut Vec<String>) {
    let mut keys: Vec<(&String, &Json)> = Vec::new();
    let mut open = schemas.to_vec();
    while let Some(schema) = open.pop() {
        if let Some(name) = schema["$ref"].as_str() {
            open.push(root.pointer(name.trim_start_matches('#')).unwrap());
        }
        let alternatives = ["anyOf", "oneOf", "allOf"].into_iter().filter_map(|key| schema[key].as_array());
        open.extend(alternatives.flatten());
        keys.extend(schema["properties"].as_object().into_iter().flatten());
        if schema["items"].is_object() {
            let items: Vec<&Json> = values.iter().filter_map(|value| value.as_array()).flatten().collect();
            every_key_is_shown(root, &[&schema["items"]], &items, &format!("{path}[]"), missing);
        }
        if schema["additionalProperties"].is_object() {
            let inner: Vec<&Json> =
                values.iter().filter_map(|value| value.as_object()).flat_map(|map| map.values()).collect();
            every_key_is_shown(root, &[&schema["additionalProperties"]], &inner, &format!("{path}.*"), missing);
        }
    }
    for (key, schema) in keys {
        let inner: Vec<&Json> = values.iter().filter_map(|value| value.get(key)).collect();
        let path = format!("{path}.{key}");
        if inner.is_empty() {
            missing.push(path);
        } else {
            every_key_is_shown(root, &[schema], &inner, &path, missing);
        }
    }
}

#[test]
fn full_yaml_shows_the_defaults_of_the_code() {
    let effective = |name| {
        let mut config = serde_json::to_value(shipped_file(name).0).unwrap();
        // The first of each list is the same in both files; the others show what else there is.
        for list in ["listeners", "routes"] {
            config[list].as_array_mut().unwrap().truncate(1);
        }
        config["upstreams"].as_object_mut().unwrap().retain(|name, _| name == "app");
        // These have no default.
        config["server"].as_object_mut().unwrap().retain(|key, _| !["user", "pid_file"].contains(&&**key));
        // No ACME issuer is contacted.
        config.as_object_mut().unwrap().remove("acme");
        config["admin"].as_object_mut().unwrap().retain(|key, _| !["token", "tls"].contains(&&**key));
        config
    };
    assert_eq!(effective("full.yaml"), effective("forebay.yaml"));
}

#[test]
fn full_yaml_shows_the_defaults_of_an_issuer() {
    use forebay::config::acme::Issuer;
    let shown = shipped_file("full.yaml").0.acme["letsencrypt"].clone();
    assert_eq!(shown.directory.as_deref(), Issuer::default().directory("letsencrypt"));
    assert_eq!(Issuer { directory: None, email: None, ..shown }, Issuer::default());
}
