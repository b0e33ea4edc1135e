//! `forebay certs`: lists the certificates of a configuration and their problems, from the files on disk.

use std::path::Path;

use super::{ConfigFile, Failure, print};
use crate::acme;
use crate::acme::plan::{Asked, Plan};
use crate::acme::schedule::Record;
use crate::client::tls::certificate::Source;
use crate::client::tls::{self, CertificateFacts};
use crate::gateway::Builder;

/// A certificate that expires within this time is reported as a problem: renewal is overdue.
const SOON_SECONDS: i64 = 7 * 86_400;
const DAY_SECONDS: i64 = 86_400;

/// One line of the table.
struct Row {
    cells: [String; 6],
    problem: Option<String>,
    /// A remark that is not an error.
    warning: Option<String>,
}

/// Lists the certificates.
pub fn certs(builder: &Builder, file: ConfigFile) -> Result<(), Failure> {
    let (_, config) = file.load(builder)?;
    let plan = Plan::of(&config).map_err(|errors| Failure::Report(config.report(&errors)))?;
    let now = tls::now();
    let names = config.listeners.iter().map(|listener| &*listener.name).chain(["admin"]);
    let sources = plan.listeners.iter().chain([&plan.admin]);
    let all = names.zip(sources).flat_map(|(listener, sources)| sources.iter().map(move |source| (listener, source)));
    let rows: Vec<Row> = all.map(|(listener, source)| row(listener, source, &plan.issuers, now)).collect();
    if rows.is_empty() {
        return print("no listener has certificates");
    }
    print(table(&rows).trim_end())?;
    match rows.iter().filter(|row| row.problem.is_some()).count() {
        0 => Ok(()),
        1 => Err(Failure::Runtime("one certificate has a problem".to_owned())),
        count => Err(Failure::Runtime(format!("{count} certificates have problems"))),
    }
}

fn row(listener: &str, source: &Source, issuers: &[Asked], now: i64) -> Row {
    let found = tls::inspect(source);
    let asked = issuers.iter().find_map(|asked| {
        let wanted = asked.certificates.iter().find(|wanted| Path::new(&source.cert) == wanted.path)?;
        Some(acme::record(asked, wanted).unwrap_or_default())
    });
    match (found, asked) {
        (Ok(Some(facts)), None) => known(listener, &facts, now),
        (Ok(Some(facts)), Some(record)) => ordered(known(listener, &facts, now), &facts, &record),
        (Ok(None), record) => {
            let why = record.and_then(|record| record.problem).map(|problem| format!(": {problem}"));
            let problem = format!("it is not issued yet{}", why.unwrap_or_default());
            unknown(listener, &source.names.join(" "), problem)
        }
        (Err(errors), _) => {
            let problem = errors.iter().map(ToString::to_string).collect::<Vec<_>>().join("; ");
            unknown(listener, &source.cert, problem)
        }
    }
}

fn known(listener: &str, facts: &CertificateFacts, now: i64) -> Row {
    let left = facts.not_after.saturating_sub(now);
    let soon = (left < SOON_SECONDS).then(|| "it ends within a week, and should have been renewed".to_owned());
    let days = if left < 0 { "over".to_owned() } else { format!("{} d", left / DAY_SECONDS) };
    let names: Vec<&str> = facts.names.iter().map(|name| &**name).collect();
    Row {
        cells: [
            listener.to_owned(),
            names.join(" "),
            facts.kind.name().to_owned(),
            day(facts.not_after),
            days,
            day(facts.renewal()),
        ],
        problem: facts.problem.clone().or(soon),
        warning: facts.mismatch(),
    }
}

/// The row of a certificate from an issuer: the stored record gives its renewal time and the last failure.
fn ordered(row: Row, facts: &CertificateFacts, record: &Record) -> Row {
    let Row { mut cells, problem, warning } = row;
    if record.serial.as_ref() == Some(&facts.serial) {
        cells[5] = day(i64::try_from(record.due).unwrap_or(i64::MAX));
    }
    // A certificate valid for a few days only is renewed on the last of them.
    let is_short = facts.not_after.saturating_sub(facts.not_before) < 3 * SOON_SECONDS;
    let problem = problem.filter(|_| facts.problem.is_some() || !is_short);
    let missing = (!facts.missing.is_empty()).then(|| {
        let names: Vec<&str> = facts.missing.iter().map(|name| &**name).collect();
        format!("it is not issued for {} yet", names.join(" "))
    });
    Row { cells, problem: record.problem.clone().or(missing).or(problem), warning }
}

fn unknown(listener: &str, file: &str, problem: String) -> Row {
    let dash = || "-".to_owned();
    let cells = [listener.to_owned(), file.to_owned(), dash(), dash(), dash(), dash()];
    Row { cells, problem: Some(problem), warning: None }
}

/// The date without the time.
fn day(seconds: i64) -> String {
    tls::certificate::date(seconds).split('T').next().unwrap_or_default().to_owned()
}

fn table(rows: &[Row]) -> String {
    let head = ["LISTENER", "NAMES", "KEY", "ENDS", "LEFT", "RENEW FROM"].map(str::to_owned);
    let widths: [usize; 6] = std::array::from_fn(|column| {
        let cells = rows.iter().map(|row| &row.cells[column]).chain([&head[column]]);
        cells.map(|cell| cell.chars().count()).max().unwrap_or(0)
    });
    let line = |cells: &[String; 6], problem: &str| {
        let padded = cells.iter().zip(widths).map(|(cell, width)| format!("{cell:width$}  "));
        (padded.collect::<String>() + problem).trim_end().to_owned() + "\n"
    };
    let mut text = line(&head, "PROBLEM");
    for row in rows {
        text += &line(&row.cells, row.problem.as_deref().or(row.warning.as_deref()).unwrap_or("-"));
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::client::hello::KeyKind;

    fn facts(not_after: i64, problem: Option<&str>) -> CertificateFacts {
        CertificateFacts {
            file: "/etc/a.pem".to_owned(),
            names: vec!["a.test".into(), "*.a.test".into()],
            missing: Vec::new(),
            foreign: Vec::new(),
            kind: KeyKind::P256,
            not_before: 0,
            not_after,
            serial: "01".to_owned(),
            issuer: "CN=An Authority".to_owned(),
            problem: problem.map(str::to_owned),
            issued: false,
        }
    }

    #[test]
    fn a_line_says_what_a_certificate_is_for_and_until_when() {
        let rows = [
            known("web", &facts(90 * DAY_SECONDS, None), DAY_SECONDS),
            known("web", &facts(90 * DAY_SECONDS, None), 88 * DAY_SECONDS),
            known("web", &facts(90 * DAY_SECONDS, Some("it expired")), 91 * DAY_SECONDS),
            known("web", &CertificateFacts { foreign: vec!["b.test".into()], ..facts(90 * DAY_SECONDS, None) }, 0),
            unknown("admin", "/etc/b.pem", "cert: `/etc/b.pem` holds no certificate in PEM".to_owned()),
        ];
        assert_eq!(
            table(&rows),
            "LISTENER  NAMES            KEY          ENDS        LEFT  RENEW FROM  PROBLEM\n\
             web       a.test *.a.test  ECDSA P-256  1970-04-01  89 d  1970-03-02  -\n\
             web       a.test *.a.test  ECDSA P-256  1970-04-01  2 d   1970-03-02  \
             it ends within a week, and should have been renewed\n\
             web       a.test *.a.test  ECDSA P-256  1970-04-01  over  1970-03-02  it expired\n\
             web       a.test *.a.test  ECDSA P-256  1970-04-01  90 d  1970-03-02  \
             it is not made out to `b.test`: clients that check names will not accept it\n\
             admin     /etc/b.pem       -            -           -     -           \
             cert: `/etc/b.pem` holds no certificate in PEM\n"
        );
    }
}
