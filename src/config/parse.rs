//! The whole way from text to configuration: every module of `config` in its order.

use std::sync::Arc;

use super::decode::Decoding;
use super::filter::FilterKind;
use super::include::{self, Gathered};
use super::interpolate::Variables;
use super::report::{Finding, Report};
use super::{Config, check, schema};

/// Parses and checks `text`; `file` is the name that the report shows.
///
/// # Errors
///
/// All errors that were found.
pub(super) fn parse(file: &str, text: &str, kinds: &[FilterKind], variables: Variables<'_>) -> Result<Config, Report> {
    let Gathered { mut source, written, mut findings } = include::gather(file, text, variables);
    if findings.iter().any(Finding::is_error) {
        return Err(Report::new(Arc::new(source), findings));
    }

    let mut decoding = Decoding::new(kinds);
    let parts = decoding.parts(&written, variables);
    findings.extend(decoding.findings);
    findings.extend(check::check(&parts, &written, kinds));
    findings.extend(check::decimal_sizes(&schema::schema(kinds), &written));
    source.secrets = decoding.secrets;

    let report = Report::new(Arc::new(source), findings);
    match parts.config() {
        Some(mut config) if report.errors() == 0 => {
            config.source = report.source();
            config.warnings = report;
            Ok(config)
        }
        _ => Err(report),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::route::ValueMatch;
    use crate::config::server::Threads;

    fn variable(name: &str) -> Option<String> {
        let value = match name {
            "NUMBER" => "123",
            "FLAG" => "true",
            "PORT" => "8080",
            _ => return None,
        };
        Some(value.to_owned())
    }

    fn parsed(more: &str) -> Result<Config, Report> {
        let text = format!(
            "listeners: [{{ name: web, address: \"127.0.0.1:${{PORT}}\" }}]\nupstreams: {{ app: {{ endpoints: [{{ address: 127.0.0.1:3000 }}] }} }}\n{more}"
        );
        parse("f.yaml", &text, &[], &variable)
    }

    const ROUTE: &str = "routes: [{ name: all, upstream: app }]\n";

    #[test]
    fn a_variable_becomes_what_its_place_asks_for() {
        let config = parsed(
            "via: ${FLAG}\nserver: { threads: \"${NUMBER}\" }\nroutes: [{ name: \"${NUMBER}\", upstream: app, match: { headers: { x: \"${NUMBER}\", y: \"${FLAG}\" } } }]\n",
        )
        .unwrap();
        assert!(config.via);
        assert_eq!(config.server.threads, Threads::Fixed(123.try_into().unwrap()));
        assert_eq!(config.listeners[0].address.0, "127.0.0.1:8080");
        assert_eq!(config.routes[0].name, "123");
        assert_eq!(config.routes[0].matches.headers["x"], ValueMatch::Exact("123".to_owned()));
        assert_eq!(config.routes[0].matches.headers["y"], ValueMatch::Exact("true".to_owned()));
    }

    #[test]
    fn a_byte_order_mark_is_no_part_of_the_first_key() {
        assert!(
            parse("f.yaml", &format!("\u{feff}version: 1\n{}", "listeners: []\nroutes: []\n"), &[], &variable)
                .is_err_and(|report| report.errors() == 2)
        );
    }

    #[test]
    fn every_wrong_item_of_a_list_is_found_at_its_place() {
        let report = parsed(&format!("trusted_proxies:\n  - a\n  - 10.0.0.0/8\n  - b\n  - 10.0.0.0/8\n  - c\n{ROUTE}"))
            .unwrap_err();
        let said = report.to_string();
        for place in ["f.yaml:4:5", "f.yaml:6:5", "f.yaml:8:5"] {
            assert!(said.contains(place), "{said}");
        }
        assert_eq!(report.errors(), 3);
    }

    #[test]
    fn what_follows_from_an_error_is_no_error_of_its_own() {
        let report = parsed("routes: [{ nmae: all, upstrem: app }]\n").unwrap_err();
        assert_eq!(report.errors(), 2, "{report}");
    }

    #[test]
    fn ten_thousand_routes_are_read_in_bearable_time() {
        let routes: String = (0..10_000)
            .map(|n| {
                format!("  - {{ name: r{n}, upstream: app, match: {{ hosts: [h{n}.com], path: {{ prefix: /a }} }} }}\n")
            })
            .collect();
        let config = parsed(&format!("routes:\n{routes}")).unwrap();
        assert_eq!(config.routes.len(), 10_000);
    }
}
