//! `forebay match`: explains how a configuration handles a request, without a running gateway.

use std::net::IpAddr;

use clap::{Args, ValueEnum};
use http::Uri;

use super::{ConfigFile, Failure, print};
use crate::gateway::Builder;
use crate::gateway::explain::{Explanation, Outcome, Question, Thing, Written};

/// The request to explain.
#[derive(Args)]
pub struct Match {
    #[command(flatten)]
    config: ConfigFile,
    /// The method (default: GET) and the URL, such as https://host/path
    #[arg(value_name = "[METHOD] URL", required = true, num_args = 1..=2)]
    request: Vec<String>,
    /// A header field, such as 'Cookie: a=b'; may be repeated
    #[arg(short = 'H', long = "header", value_name = "FIELD")]
    fields: Vec<String>,
    /// The address of the client
    #[arg(long, value_name = "ADDRESS", default_value_t = Question::CLIENT)]
    from: IpAddr,
    /// The listener that receives the request, if the port of the URL does not determine it
    #[arg(long, value_name = "NAME")]
    listener: Option<String>,
    /// The output format
    #[arg(long, value_name = "FORMAT", default_value = "text")]
    format: Format,
}

/// The output format.
#[derive(Clone, Copy, ValueEnum)]
enum Format {
    /// For people.
    Text,
    /// For programs.
    Json,
}

/// Explains the request.
pub fn matched(builder: &Builder, asked: Match) -> Result<(), Failure> {
    let (path, config) = asked.config.load(builder)?;
    let written = config.clone();
    let explainer = builder.explain(config).map_err(|errors| Failure::Report(written.report(&errors)))?;
    let question = question(&asked.request, &asked.fields, asked.from, asked.listener).map_err(Failure::Usage)?;
    let explanation = explainer.explain(&question).map_err(|unclear| Failure::Usage(unclear.to_string()))?;
    match asked.format {
        Format::Text => print(&told(&explanation, written.files().next().unwrap_or_default()))?,
        Format::Json => {
            let json = serde_json::to_string_pretty(&explanation);
            print(&json.map_err(|error| Failure::Runtime(format!("the answer cannot be written: {error}")))?)?;
        }
    }
    match explanation.outcome {
        Outcome::Refused { reason, status } => {
            Err(Failure::Runtime(format!("{}: it is refused: {reason} ({status})", path.display())))
        }
        _ => Ok(()),
    }
}

fn question(
    request: &[String],
    fields: &[String],
    client: IpAddr,
    listener: Option<String>,
) -> Result<Question, String> {
    let (method, url) = match request {
        [url] => ("GET", url),
        [method, url] => (&**method, url),
        _ => return Err("a method and a URL are asked for".to_owned()),
    };
    let whole = if url.contains("://") { url.clone() } else { format!("http://{url}") };
    let url: Uri = whole.parse().map_err(|_| format!("`{url}` is not a URL: write one such as https://host/path"))?;
    let field = |field: &String| {
        let (name, value) =
            field.split_once(':').ok_or_else(|| format!("`{field}` is not a header field: write NAME: VALUE"))?;
        Ok::<_, String>((name.trim().to_owned(), value.trim().to_owned()))
    };
    let fields = fields.iter().map(field).collect::<Result<_, _>>()?;
    Ok(Question { method: method.to_owned(), url, fields, client, listener })
}

/// The explanation, line by line. Positions in the main file are shown without its name, which is shown once.
fn told(explanation: &Explanation, main: &str) -> String {
    let place = |at: &Option<Written>| {
        at.as_ref().map(|Written { file, line }| match file == main {
            true => format!("line {line}"),
            false => format!("{file} line {line}"),
        })
    };
    let line_of = |what: &str, thing: &Thing| {
        let at = place(&thing.at).map(|at| format!(", {at}")).unwrap_or_default();
        let more = if thing.more.is_empty() { String::new() } else { format!(": {}", thing.more) };
        format!("{what:<10} {}{more} ({}{at})\n", thing.name, thing.path)
    };
    let mut text = line_of("listener", &explanation.listener);
    match &explanation.outcome {
        Outcome::Routed { route } => text += &line_of("route", route),
        Outcome::Refused { reason, status } => text += &format!("refused    {reason}, with status {status}\n"),
        Outcome::Answered { status, location } => {
            let location = location.as_ref().map(|location| format!(" to {location}")).unwrap_or_default();
            text += &format!("answered   {status}{location}, by Forebay itself\n");
        }
        Outcome::PassedOn { upstream } => text += &format!("passed on  as it is, to the upstream {upstream}\n"),
    }
    explanation.filters.iter().for_each(|filter| text += &line_of("filter", filter));
    explanation.upstreams.iter().for_each(|upstream| text += &line_of("upstream", upstream));
    for held in &explanation.values {
        let from = place(&held.at).unwrap_or("default".to_owned());
        text += &format!("value      {} = {} ({from})\n", held.path, held.value);
    }
    for other in &explanation.others {
        let at = place(&other.at).map(|at| format!(" ({at})")).unwrap_or_default();
        text += &format!("not taken  {}{at}: {}\n", other.route, other.why);
    }
    text.truncate(text.trim_end().len());
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    fn asked(request: &[&str], fields: &[&str]) -> Result<Question, String> {
        let owned = |words: &[&str]| words.iter().map(|word| (*word).to_owned()).collect::<Vec<_>>();
        question(&owned(request), &owned(fields), Question::CLIENT, None)
    }

    #[test]
    fn a_request_is_read_as_people_write_it() {
        let question = asked(&["POST", "https://a.test/b?c"], &["X-A: 1", "cookie:d=e"]).expect("a question");
        assert_eq!((&*question.method, question.url.path()), ("POST", "/b"));
        let fields: Vec<_> = question.fields.iter().map(|(name, value)| (&**name, &**value)).collect();
        assert_eq!(fields, [("X-A", "1"), ("cookie", "d=e")]);
        let short = asked(&["a.test/b"], &[]).expect("a question");
        assert_eq!((&*short.method, short.url.to_string().as_str()), ("GET", "http://a.test/b"));
        assert!(asked(&["http://a b/"], &[]).is_err() && asked(&["a.test"], &["X-A"]).is_err());
    }

    #[test]
    fn an_explanation_is_read_line_by_line() {
        let thing = |name: &str, path: &str, (file, line): (&str, usize), more: &str| Thing {
            name: name.to_owned(),
            path: path.to_owned(),
            at: Some(Written { file: file.to_owned(), line }),
            more: more.to_owned(),
        };
        let explanation = Explanation {
            listener: thing("web", "listeners[0]", ("a.yaml", 2), "127.0.0.1:80"),
            outcome: Outcome::Routed { route: thing("all", "routes[0]", ("b/c.yaml", 4), "") },
            filters: vec![thing("headers", "routes[0].filters[0]", ("b/c.yaml", 5), "when true")],
            upstreams: Vec::new(),
            values: Vec::new(),
            others: Vec::new(),
        };
        let expected = "listener   web: 127.0.0.1:80 (listeners[0], line 2)
route      all (routes[0], b/c.yaml line 4)
filter     headers: when true (routes[0].filters[0], b/c.yaml line 5)";
        assert_eq!(told(&explanation, "a.yaml"), expected);
    }
}
