//! `POST /trace`: records the phases of the next matching exchanges, and sends each one when it ends, as a line of
//! JSON.
//!
//! The first line says that recording has begun, so that the client may send the requests to record; the last one
//! says why it has ended. `conf/manual/trace.md` documents the lines between; `forebay trace` draws them.

use std::future::ready;
use std::net::IpAddr;
use std::time::Duration;

use bytes::Bytes;
use futures::stream;
use http::StatusCode;
use ipnet::IpNet;
use serde_json::json;
use tokio::time::Instant;

use super::Admin;
use super::reply::{Pieces, Reply};
use super::status::Shown;
use super::table::Ask;
use crate::recorder::{COUNT_MAX, Recorder, Recording, Wanted};

/// Default number of exchanges and default time.
const COUNT: u32 = 10;
const FOR: Duration = Duration::from_secs(60);
/// Longest recording.
const FOR_MAX: Duration = Duration::from_secs(600);

/// The parameters of a recording.
#[derive(Debug, PartialEq)]
struct Order {
    wanted: Wanted,
    count: u32,
    time: Duration,
}

/// Adds recordings to the admin endpoint, for the routes in `shown`.
pub fn add(admin: Admin, recorder: Recorder, shown: &Shown) -> Admin {
    let shown = shown.clone();
    let says = "records the next exchanges that match, with their phases: ?route= &client= &path= &status= &slower_than= &count= &for=";
    admin.post("/trace", says, move |ask: Ask| {
        let routes: Vec<String> = shown.load().routes.iter().map(|route| route.metrics.name().to_owned()).collect();
        ready(match order(ask.arguments(), &routes) {
            Ok(order) => Reply::lines(lines(&recorder, order)),
            Err(what) => Reply::error(StatusCode::BAD_REQUEST, &what),
        })
    })
}

fn order(arguments: impl Iterator<Item = (String, String)>, routes: &[String]) -> Result<Order, String> {
    let mut order = Order { wanted: Wanted::default(), count: COUNT, time: FOR };
    for (name, value) in arguments {
        let wrong = |what: &str| format!("`{name}={value}`: {what}");
        let time = || humantime::parse_duration(&value).map_err(|_| wrong("expected a time such as 500ms or 30s"));
        match &*name {
            "route" if routes.contains(&value) => order.wanted.route = Some(value),
            "route" => return Err(format!("no route is called `{value}`; there are: {}", routes.join(", "))),
            "client" => {
                let address = || value.parse::<IpAddr>().map(IpNet::from);
                let net = value.parse().or_else(|_| address());
                order.wanted.client = Some(net.map_err(|_: std::net::AddrParseError| {
                    wrong("expected an IP address or a network such as 10.0.0.0/8")
                })?);
            }
            "path" if value.starts_with('/') => order.wanted.path = Some(value),
            "path" => return Err(wrong("a path begins with `/`")),
            "status" => {
                order.wanted.status = Some(statuses(&value).ok_or_else(|| wrong("a status is one like 404 or 5xx"))?)
            }
            "slower_than" => order.wanted.slower_than = Some(time()?),
            "count" => match value.parse() {
                Ok(count @ 1..=COUNT_MAX) => order.count = count,
                _ => return Err(wrong(&format!("from 1 to {COUNT_MAX}"))),
            },
            "for" => match time()? {
                time if !time.is_zero() && time <= FOR_MAX => order.time = time,
                _ => return Err(wrong(&format!("at most {}", humantime::format_duration(FOR_MAX)))),
            },
            _ => return Err(wrong("there are: route, client, path, status, slower_than, count, for")),
        }
    }
    Ok(order)
}

/// `404` is one status, `5xx` a class.
fn statuses(text: &str) -> Option<(u16, u16)> {
    if let Some(class) = text.strip_suffix("xx") {
        let class: u16 = class.parse().ok().filter(|class| (1..=5).contains(class))?;
        return Some((class * 100, class * 100 + 99));
    }
    let status = text.parse().ok().filter(|status| (100..=599).contains(status))?;
    Some((status, status))
}

enum Stage {
    Begin(Order),
    Running(Recording, Instant, u32),
    Over,
}

fn lines(recorder: &Recorder, order: Order) -> Pieces {
    let recorder = recorder.clone();
    Box::pin(stream::unfold(Stage::Begin(order), move |stage| {
        let recorder = recorder.clone();
        async move {
            match stage {
                Stage::Begin(Order { wanted, count, time }) => {
                    let began = json!({ "recording": { "count": count, "for_seconds": time.as_secs_f64() } });
                    let recording = recorder.record(wanted, count);
                    Some((line(&began), Stage::Running(recording, Instant::now() + time, 0)))
                }
                Stage::Running(mut recording, until, told) => {
                    let end = |why: &str| (line(&json!({ "end": { "why": why, "recorded": told } })), Stage::Over);
                    Some(match tokio::time::timeout_at(until, recording.next()).await {
                        Ok(Some(recorded)) => {
                            (line(&json!({ "exchange": *recorded })), Stage::Running(recording, until, told + 1))
                        }
                        Ok(None) => end("count"),
                        Err(_) => end("time"),
                    })
                }
                Stage::Over => None,
            }
        }
    }))
}

fn line(value: &serde_json::Value) -> Bytes {
    format!("{value}\n").into()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ordered(arguments: &[(&str, &str)]) -> Result<Order, String> {
        let arguments = arguments.iter().map(|(name, value)| ((*name).to_owned(), (*value).to_owned()));
        order(arguments, &["shop".to_owned(), "_none".to_owned()])
    }

    #[test]
    fn what_is_asked_for_is_understood_or_refused_with_what_would_do() {
        let order = ordered(&[
            ("route", "shop"),
            ("client", "192.0.2.7"),
            ("path", "/a"),
            ("status", "5xx"),
            ("slower_than", "250ms"),
            ("count", "3"),
            ("for", "2m"),
        ]);
        let wanted = Wanted {
            route: Some("shop".to_owned()),
            client: Some("192.0.2.7/32".parse().unwrap()),
            path: Some("/a".to_owned()),
            status: Some((500, 599)),
            slower_than: Some(Duration::from_millis(250)),
        };
        assert_eq!(order, Ok(Order { wanted, count: 3, time: Duration::from_secs(120) }));
        assert_eq!(ordered(&[("status", "404")]).unwrap().wanted.status, Some((404, 404)));
        assert_eq!(ordered(&[]).unwrap().count, COUNT);
        for (name, value, said) in [
            ("route", "shopp", "there are: shop, _none"),
            ("client", "here", "expected an IP address"),
            ("path", "a", "begins with `/`"),
            ("status", "6xx", "404 or 5xx"),
            ("slower_than", "5", "expected a time"),
            ("count", "0", "from 1 to 1000"),
            ("count", "1001", "from 1 to 1000"),
            ("for", "11m", "at most 10m"),
            ("fore", "1s", "there are: route"),
        ] {
            let error = ordered(&[(name, value)]).expect_err(name);
            assert!(error.contains(said), "{error}");
        }
    }
}
