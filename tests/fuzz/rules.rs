//! A rule: whatever is written, `check` accepts it or names the place of the mistake, and what it accepts decides about
//! any request without failing, as the interpreter of the `cel` crate does where the languages agree.

#[path = "../../src/expression/tests/interpreter.rs"]
mod interpreter;
#[path = "../../src/expression/tests/tokens.rs"]
mod tokens;

use std::fs;
use std::net::IpAddr;
use std::path::{Path, PathBuf};
use std::sync::LazyLock;
use std::time::{Duration, Instant};

use forebay::error::BuildError;
use forebay::expression::facts::Response;
use forebay::expression::names::{FUNCTIONS, VARIABLES};
use forebay::expression::{Asked, Condition, Facts, Moment, Value};
use forebay::gateway::{Builder, Gateway};
use http::{HeaderMap, HeaderName, HeaderValue, Method, Uri, Version};
use nix::sys::resource::{UsageWho, getrusage};
use rand::rngs::StdRng;
use rand::seq::SliceRandom;
use rand::{Rng, SeedableRng};
use regex::Regex;

use super::{corpus, mutate};

/// Far more than any of these inputs takes on a busy machine, and far less than what is not linear.
const PATIENCE: Duration = Duration::from_secs(20);
/// One rule takes less memory, on the stack of its thread and on the heap together.
const MEMORY_KIB_MAX: i64 = 256 << 10;
/// The length limit of what a value makes: `replace` and `+` cut off behind it.
const TEXT_BYTES_MAX: usize = 64 * (256 << 10);

#[test]
fn any_text_is_a_rule_or_is_told_why_not() {
    let words: Vec<&str> = VARIABLES
        .iter()
        .map(|it| it.name)
        .chain(FUNCTIONS.iter().map(|it| it.name))
        .chain(tokens::SIGNS.iter().copied())
        .collect();
    let seeds = [corpus("rules"), written_rules()].concat();
    mutate::explore_from("rules", seeds.clone(), &words, check);
    let seed = mutate::seed();
    let mut tokens = Tokens::new(&seeds, &words, seed);
    mutate::explore_made("rules", seed, || tokens.input(), check);
}

#[test]
fn every_rule_of_the_manual_and_the_examples_is_one() {
    let rules = rules_of_yaml();
    assert!(rules.len() >= 25, "{rules:#?}");
    for rule in rules {
        let (condition, value) = (Condition::build(&rule, Moment::Response), Value::shown(&rule, Moment::Response));
        assert!(condition.is_ok() || value.is_ok(), "{rule}: {condition:?} {value:?}");
    }
}

/// All rules in the YAML of the manual and the examples, and all code in the manual's page about expressions.
fn written_rules() -> Vec<Vec<u8>> {
    let page = fs::read_to_string("conf/manual/expressions.md").expect("the page").replace("\\|", "|");
    let code = page.split('`').skip(1).step_by(2).map(str::to_owned);
    rules_of_yaml().into_iter().chain(code).map(String::into_bytes).collect()
}

fn rules_of_yaml() -> Vec<String> {
    let mut rules = Vec::new();
    for file in ["conf", "conf/examples", "conf/examples/own-filter", "conf/manual"].iter().flat_map(files) {
        let text = fs::read_to_string(&file).expect("a file");
        let blocks: Vec<&str> = match file.extension() {
            Some(extension) if extension == "md" => {
                text.split("```yaml\n").skip(1).filter_map(|rest| rest.split("```").next()).collect()
            }
            _ => vec![&text],
        };
        for block in blocks {
            // A fragment need not be YAML by itself; those that are suffice.
            if let Ok(value) = serde_yaml::from_str::<serde_yaml::Value>(block) {
                collect(&value, &mut rules);
            }
        }
    }
    rules.sort();
    rules.dedup();
    rules
}

fn files(folder: &&str) -> Vec<PathBuf> {
    let paths = fs::read_dir(Path::new(folder)).expect("a folder").map(|entry| entry.expect("an entry").path());
    paths.filter(|path| path.extension().is_some_and(|extension| extension == "yaml" || extension == "md")).collect()
}

/// What is written behind `when:` and `cel:`.
fn collect(value: &serde_yaml::Value, rules: &mut Vec<String>) {
    match value {
        serde_yaml::Value::Mapping(map) => {
            for (key, value) in map {
                match (key.as_str(), value.as_str()) {
                    (Some("when" | "cel"), Some(rule)) => rules.push(rule.to_owned()),
                    _ => collect(value, rules),
                }
            }
        }
        serde_yaml::Value::Sequence(items) => items.iter().for_each(|item| collect(item, rules)),
        _ => {}
    }
}

/// Makes rules of whole tokens, so that most of them get past the parser.
struct Tokens {
    dice: StdRng,
    rules: Vec<Vec<String>>,
    pool: Vec<String>,
}

impl Tokens {
    fn new(seeds: &[Vec<u8>], words: &[&str], seed: u64) -> Tokens {
        let token =
            Regex::new(r#"(?s)r?"(?:\\.|[^"\\])*"|r?'(?:\\.|[^'\\])*'|[A-Za-z_][\w]*|[\d.]+|\s+|[=!<>]=|&&|\|\||."#)
                .expect("a pattern");
        let rules: Vec<Vec<String>> = seeds
            .iter()
            .filter_map(|seed| std::str::from_utf8(seed).ok().filter(|seed| seed.len() < 1_000))
            .map(|seed| token.find_iter(seed).map(|found| found.as_str().to_owned()).collect())
            .collect();
        let pool = rules.iter().flatten().cloned().chain(words.iter().map(|&word| word.to_owned())).collect();
        Tokens { dice: StdRng::seed_from_u64(seed), rules, pool }
    }

    fn input(&mut self) -> Vec<u8> {
        let mut rule = self.rules.choose(&mut self.dice).cloned().unwrap_or_default();
        for _ in 0..=self.dice.gen_range(0..4) {
            self.change(&mut rule);
            rule.truncate(500);
        }
        rule.concat().into_bytes()
    }

    fn change(&mut self, rule: &mut Vec<String>) {
        let dice = &mut self.dice;
        let at = dice.gen_range(0..=rule.len());
        let to = (at + dice.gen_range(0..8)).min(rule.len());
        match dice.gen_range(0..7) {
            0 => drop(rule.drain(at..to)),
            1 => {
                let piece = rule[at..to].to_vec();
                drop(rule.splice(at..at, piece));
            }
            2 => {
                // One whole rule joined to another.
                let other = self.rules.choose(dice).cloned().unwrap_or_default();
                let sign = [" && ", " || ", " == ", " + ", " in "].choose(dice).copied().unwrap_or_default();
                rule.insert(0, "(".to_owned());
                rule.extend([")", sign, "("].map(str::to_owned));
                rule.extend(other);
                rule.push(")".to_owned());
            }
            3 => {
                let function = FUNCTIONS.choose(dice).map_or("", |function| function.name);
                rule.insert(0, "(".to_owned());
                let argument = self.pool.choose(dice).cloned().unwrap_or_default();
                rule.push(format!(").{function}({argument})"));
            }
            _ => {
                let over = if dice.r#gen() { at } else { (at + 1).min(rule.len()) };
                let token = self.pool.choose(dice).cloned();
                drop(rule.splice(at..over, token));
            }
        }
    }
}

fn check(bytes: &[u8]) {
    let Ok(text) = std::str::from_utf8(bytes) else { return };
    let (began, peak) = (Instant::now(), peak_kib());
    let mut dice = StdRng::seed_from_u64(bytes.iter().fold(7, |seed, &byte| seed.wrapping_mul(131) + u64::from(byte)));
    let requests: Vec<Request> = (0..3).map(|_| Request::random(&mut dice)).collect();
    let moment = [Moment::Match, Moment::Request, Moment::Response][dice.gen_range(0..3)];
    match Condition::build(text, moment) {
        Ok(condition) => {
            for request in &requests {
                request.asked(moment, |asked| assert_eq!(condition.holds(asked), condition.holds(asked), "{text}"));
            }
        }
        Err(error) => placed(text, &error),
    }
    match if dice.r#gen() { Value::build(text, moment) } else { Value::shown(text, moment) } {
        Ok(value) => {
            for request in &requests {
                request.asked(moment, |asked| assert!(value.of(asked).len() <= TEXT_BYTES_MAX, "{text}"));
            }
        }
        Err(error) => placed(text, &error),
    }
    compared(text, &Request::random_plain(&mut dice));
    if bytes.len().is_multiple_of(8) {
        checked(text);
    }
    assert!(began.elapsed() < PATIENCE, "{:?}", began.elapsed());
    assert!(peak_kib() - peak < MEMORY_KIB_MAX, "{} KiB", peak_kib() - peak);
}

/// The most memory that this process has had.
fn peak_kib() -> i64 {
    getrusage(UsageWho::RUSAGE_SELF).expect("figures").max_rss()
}

/// A mistake says what it is and where: bytes of the rule, and the line and the column at which they begin.
fn placed(text: &str, error: &BuildError) {
    assert!(!error.message.is_empty(), "{text:?}");
    assert!(!error.message.contains("in a simpler way"), "reading {text:?} has panicked");
    let inside = error.inside.as_ref().unwrap_or_else(|| panic!("{text:?} has no place: {error:?}"));
    let before = text.get(..inside.bytes.start).unwrap_or_else(|| panic!("{text:?}: {error:?}"));
    assert!(text.get(inside.bytes.clone()).is_some(), "{text:?}: {error:?}");
    let line = before.split('\n').count();
    let column = before.split('\n').next_back().map_or(0, |last| last.chars().count()) + 1;
    assert_eq!((inside.line, inside.column), (line, column), "{text:?}: {error:?}");
}

/// What an operator gets to read about a configuration with this rule: an error if there is one, fit for a terminal.
fn checked(text: &str) {
    static BUILDER: LazyLock<Builder> = LazyLock::new(Gateway::builder);
    // A variable would be put in its place.
    if text.contains('$') {
        return;
    }
    let quoted: String = text
        .chars()
        .map(|c| match c {
            ' '..='~' if c != '"' && c != '\\' => c.to_string(),
            c => format!("\\U{:08x}", u32::from(c)),
        })
        .collect();
    let config = format!(
        "listeners: [ {{ name: web, address: \"127.0.0.1:0\" }} ]\n\
         routes: [ {{ name: all, match: {{ when: \"{quoted}\" }}, filters: [ respond: {{ status: 204 }} ] }} ]\n"
    );
    let (errors, report) = match BUILDER.parse("fuzz.yaml", &config) {
        Err(report) => (report.errors(), report.to_string()),
        Ok(config) => {
            let report = config.report(&BUILDER.check(&config));
            (report.errors(), report.to_string())
        }
    };
    assert_eq!(errors == 0, Condition::build(text, Moment::Match).is_ok(), "{text:?}: {report}");
    assert!(!report.chars().any(|c| c.is_control() && c != '\n'), "{report:?}");
}

/// A rule in which both languages mean the same must give the same. Where the interpreter fails (a missing header, an
/// index out of bounds, a number too large), ours has an answer by design.
fn compared(text: &str, request: &Request) {
    static DIFFERENT: LazyLock<Regex> = LazyLock::new(|| {
        let ours = [
            // Numbers with a fraction are compared and written in another way.
            r"\d\.|\.\d|\d[eE]",
            // A conversion gives 0 or nothing where the interpreter fails, or is a function of ours alone.
            r"\b(int|double|string|orValue|values|hash|ip|isIP|cidr|substring)\b",
            // An empty text is nowhere, and nothing is split at it.
            r#"\b(split|replace)\s*\(\s*([^"'\s]|""|'')"#,
            // In a pattern, `.` is a line break, too.
            r"(?s)matches.*[\\\n\r]|[\\\n\r].*matches",
            // The name of a header is asked for in any case.
            r"headers.*[A-Z]|[A-Z].*headers",
        ];
        Regex::new(&ours.join("|")).expect("a pattern")
    });
    if DIFFERENT.is_match(text) {
        return;
    }
    let Ok(condition) = Condition::build(text, Moment::Request) else { return };
    let method = request.method.as_str();
    let path = request.target.path();
    if let Ok(theirs) = interpreter::interpreted(text, method, path, &request.headers) {
        request.asked(Moment::Request, |asked| {
            assert_eq!(theirs, cel::Value::Bool(condition.holds(asked)), "{text:?} asked of {request:?}");
        });
    }
}

/// A request, and what is known of its client.
#[derive(Debug)]
struct Request {
    method: Method,
    target: Uri,
    version: Version,
    headers: HeaderMap,
    client: Option<IpAddr>,
}

const NAMES: &[&str] =
    &["host", "x-user", "cookie", "content-length", "transfer-encoding", "x-request-id", "user-agent", "x-api-key"];
const VALUES: &[&[u8]] =
    &[b"", b",", b"a=;=;a", b"sid=1;sid=2", b":", b"[::1]:", b"-1", b"\xff\xfe", "\u{e4},b".as_bytes(), b"%", b"a.b.c"];
const PLAIN: &[&[u8]] = &[b"", b"a", b"joe", b"a.b.c", b"Shop.Example.com", b"12", b" a ", b"a, b"];
const TARGETS: &[&str] = &["/", "/?", "/?=", "/?&&=&a", "/?q=%", "/?q=%FF&q=%00+", "/a?q=1&n=&n=%2C", "/%ff?%71=x"];

impl Request {
    /// A request as the worst clients send it: fields twice or not at all, with any bytes.
    fn random(dice: &mut StdRng) -> Request {
        let mut headers = HeaderMap::new();
        for _ in 0..dice.gen_range(0..10) {
            let value = match dice.gen_range(0..8) {
                0 => vec![b'a'; dice.gen_range(0..40_000)],
                1 => (0..dice.gen_range(0..40)).map(|_| dice.r#gen()).collect(),
                _ => VALUES.choose(dice).map(|value| value.to_vec()).unwrap_or_default(),
            };
            if let (Some(name), Ok(value)) = (NAMES.choose(dice), HeaderValue::from_bytes(&value)) {
                headers.append(HeaderName::from_static(name), value);
            }
        }
        let clients = ["::", "0.0.0.0", "::ffff:255.255.255.255", "fe80::1", "10.1.2.3"];
        Request {
            client: clients.choose(dice).filter(|_| dice.gen_ratio(4, 5)).and_then(|client| client.parse().ok()),
            version: [Version::HTTP_10, Version::HTTP_11, Version::HTTP_2][dice.gen_range(0..3)],
            headers,
            ..Request::random_plain(dice)
        }
    }

    /// A request with one value of ASCII in each field.
    fn random_plain(dice: &mut StdRng) -> Request {
        let mut headers = HeaderMap::new();
        for name in NAMES {
            if let Some(value) = PLAIN.choose(dice).filter(|_| dice.gen_ratio(3, 4)) {
                headers.insert(HeaderName::from_static(name), HeaderValue::from_bytes(value).expect("a value"));
            }
        }
        let method = [Method::GET, Method::POST, Method::HEAD].choose(dice).cloned().unwrap_or_default();
        let target = Uri::from_static(TARGETS.choose(dice).copied().unwrap_or("/"));
        Request { method, target, version: Version::HTTP_11, headers, client: None }
    }

    /// Hands over what an expression is asked of at this moment.
    fn asked(&self, moment: Moment, ask: impl FnOnce(&Asked<'_>)) {
        let facts = Facts { client: self.client, ..Facts::of("shop", self.target.path()) };
        let response = (moment == Moment::Response).then_some(Response { code: 404, headers: Some(&self.headers) });
        ask(&Asked {
            facts,
            method: &self.method,
            target: &self.target,
            version: self.version,
            headers: &self.headers,
            response,
        });
    }
}
