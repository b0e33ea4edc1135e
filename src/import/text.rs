//! Converts texts with variables, and conditions, to CEL expressions.

use std::collections::BTreeMap;

use regex::Regex;

/// A text in a Forebay configuration.
#[derive(Clone, Debug, PartialEq)]
pub enum Made {
    /// A constant.
    Fixed(String),
    /// An expression.
    Cel(String),
}

/// The values of variables at one place of the configuration.
#[derive(Clone, Debug, Default)]
pub struct Variables {
    /// Variables from `set`, `map` and `geo`, and those that are constant here, such as `$server_name`.
    pub known: BTreeMap<String, Made>,
}

/// A part of a text.
#[derive(Clone, Debug, PartialEq)]
pub enum Piece {
    /// Text.
    Text(String),
    /// A variable, without its `$`.
    Variable(String),
}

/// Splits a text into plain text and variables.
pub fn pieces(text: &str) -> Vec<Piece> {
    let mut pieces = Vec::new();
    let mut plain = String::new();
    let mut rest = text;
    while let Some(at) = rest.find('$') {
        let after = &rest[at + 1..];
        let (name, behind) = match after.strip_prefix('{').and_then(|inner| inner.split_once('}')) {
            Some((name, behind)) => (name, behind),
            None if after.starts_with(|c: char| c.is_ascii_digit()) => after.split_at(1),
            None => after.split_at(after.find(|c: char| !c.is_ascii_alphanumeric() && c != '_').unwrap_or(after.len())),
        };
        plain.push_str(&rest[..at]);
        rest = behind;
        if name.is_empty() {
            plain.push('$');
            continue;
        }
        if !plain.is_empty() {
            pieces.push(Piece::Text(std::mem::take(&mut plain)));
        }
        pieces.push(Piece::Variable(name.to_owned()));
    }
    plain.push_str(rest);
    if !plain.is_empty() {
        pieces.push(Piece::Text(plain));
    }
    pieces
}

/// A CEL literal.
pub fn literal(text: &str) -> String {
    let mut quoted = String::from("\"");
    for one in text.chars() {
        match one {
            '"' | '\\' => quoted.extend(['\\', one]),
            '\n' => quoted.push_str("\\n"),
            '\r' => quoted.push_str("\\r"),
            '\t' => quoted.push_str("\\t"),
            other => quoted.push(other),
        }
    }
    quoted + "\""
}

/// The CEL form of an nginx variable; `None` without an equivalent.
fn variable(name: &str) -> Option<String> {
    let fixed = match name {
        "host" => "request.host",
        "http_host" => "request.headers[\"host\"]",
        "scheme" => "request.scheme",
        "remote_addr" | "realip_remote_addr" => "string(source.address)",
        "binary_remote_addr" => "source.network",
        "remote_port" => "string(source.port)",
        "request_uri" => "request.target",
        "uri" | "document_uri" => "request.path",
        "args" | "query_string" => "request.query",
        "is_args" => "(request.query == \"\" ? \"\" : \"?\")",
        "request_method" => "request.method",
        "request_id" => "request.id",
        "content_length" => "request.headers[\"content-length\"]",
        "content_type" => "request.headers[\"content-type\"]",
        "server_protocol" => "(\"HTTP/\" + request.version)",
        "ssl_protocol" => "connection.tls_version",
        "ssl_server_name" => "connection.sni",
        "ssl_client_s_dn" => "connection.peer_subject",
        "https" => "(request.scheme == \"https\" ? \"on\" : \"\")",
        "status" => "string(response.code)",
        _ => "",
    };
    if !fixed.is_empty() {
        return Some(fixed.to_owned());
    }
    let field = |name: &str| literal(&name.replace('_', "-"));
    let of = |prefix: &str| name.strip_prefix(prefix).filter(|rest| !rest.is_empty());
    if let Some(rest) = of("upstream_http_").or_else(|| of("sent_http_")) {
        return Some(format!("response.headers[{}]", field(rest)));
    }
    if let Some(rest) = of("http_") {
        return Some(format!("request.headers[{}]", field(rest)));
    }
    if let Some(rest) = of("cookie_") {
        return Some(format!("request.cookies[{}]", literal(rest)));
    }
    of("arg_").map(|rest| format!("request.args[{}]", literal(rest)))
}

impl Variables {
    /// Converts a text with variables.
    ///
    /// # Errors
    ///
    /// The variable without an equivalent.
    pub fn made(&self, text: &str) -> Result<Made, String> {
        let mut parts: Vec<Made> = Vec::new();
        for piece in pieces(text) {
            let made = match piece {
                Piece::Text(text) => Made::Fixed(text),
                Piece::Variable(name) => match self.known.get(&name) {
                    Some(made) => made.clone(),
                    None => Made::Cel(variable(&name).ok_or(format!("there is nothing like `${name}`"))?),
                },
            };
            match (parts.last_mut(), made) {
                (Some(Made::Fixed(before)), Made::Fixed(text)) => before.push_str(&text),
                (_, made) => parts.push(made),
            }
        }
        Ok(match parts.as_slice() {
            [] => Made::Fixed(String::new()),
            [one] => one.clone(),
            _ => Made::Cel(parts.iter().map(Made::expression).collect::<Vec<_>>().join(" + ")),
        })
    }

    /// Converts the condition of an `if`, given as words including the parentheses.
    ///
    /// # Errors
    ///
    /// The part without an equivalent.
    pub fn condition(&self, words: &[String]) -> Result<String, String> {
        // The parentheses are separate words, or part of the first and the last word.
        let mut words = words.to_vec();
        match words.first_mut().map(|first| first.strip_prefix('(').map(str::to_owned)) {
            Some(Some(rest)) if rest.is_empty() => drop(words.remove(0)),
            Some(Some(rest)) => words[0] = rest,
            _ => {}
        }
        match words.pop() {
            Some(last) if last != ")" => words.push(last.strip_suffix(')').unwrap_or(&last).to_owned()),
            _ => {}
        }
        let asked = |name: &str| -> Result<String, String> {
            if !name.starts_with('$') {
                return Err(format!("`{name}` asks for a file, and Forebay has none"));
            }
            Ok(self.made(name)?.expression())
        };
        match words.iter().map(String::as_str).collect::<Vec<_>>().as_slice() {
            [name] => {
                let value = asked(name)?;
                Ok(format!("!({value} in [\"\", \"0\"])"))
            }
            [name, "=" | "!="] => Ok(format!("{} {} \"\"", asked(name)?, sign(&words[1]))),
            [name, operator @ ("=" | "!="), value] => {
                Ok(format!("{} {} {}", asked(name)?, sign(operator), self.made(value)?.expression()))
            }
            [name, operator @ ("~" | "~*" | "!~" | "!~*"), pattern] => {
                let pattern = regular(pattern, operator.ends_with('*'))?;
                let not = if operator.starts_with('!') { "!" } else { "" };
                Ok(format!("{not}{}.matches({})", in_parentheses(&asked(name)?), literal(&pattern)))
            }
            other => Err(format!("`{}` is not a condition that Forebay supports", other.join(" "))),
        }
    }
}

fn sign(operator: &str) -> &'static str {
    if operator == "=" { "==" } else { "!=" }
}

fn in_parentheses(expression: &str) -> String {
    let simple = !expression.contains([' ', '?']) || (expression.starts_with('(') && expression.ends_with(')'));
    if simple { expression.to_owned() } else { format!("({expression})") }
}

impl Made {
    /// As an expression.
    pub fn expression(&self) -> String {
        match self {
            Made::Fixed(text) => literal(text),
            Made::Cel(expression) => expression.clone(),
        }
    }
}

/// Converts a PCRE pattern to Forebay's syntax.
///
/// # Errors
///
/// It uses a feature that only PCRE has.
pub fn regular(pattern: &str, any_case: bool) -> Result<String, String> {
    // PCRE has two forms of named groups that Rust lacks.
    let pattern = pattern.replace("(?'", "(?<");
    let pattern = if any_case { format!("(?i){pattern}") } else { pattern };
    match Regex::new(&pattern) {
        Ok(_) => Ok(pattern),
        Err(_) => Err(format!(
            "`{pattern}` has something that only PCRE has, such as `(?!…)`: such patterns may take exponential time"
        )),
    }
}

/// The same for a whole path: nginx searches for a match anywhere.
///
/// # Errors
///
/// As for [`regular`].
pub fn whole(pattern: &str, any_case: bool) -> Result<String, String> {
    regular(pattern, any_case)?;
    // A pattern with alternatives at its top level cannot be trimmed.
    let plain = !pattern.contains('|');
    let (begin, rest) = match pattern.strip_prefix('^').filter(|_| plain) {
        Some(rest) => ("", rest),
        None => (".*", pattern),
    };
    let (rest, end) = match rest.strip_suffix('$').filter(|rest| plain && !rest.ends_with('\\')) {
        Some(rest) => (rest, ""),
        None => (rest, ".*"),
    };
    let rest = match plain {
        true => rest.to_owned(),
        false => format!("(?:{rest})"),
    };
    // `.*.*` and the like.
    let begin = if rest.starts_with(".*") { "" } else { begin };
    let end = if rest.ends_with(".*") && !rest.ends_with("\\.*") { "" } else { end };
    let case = if any_case { "(?i)" } else { "" };
    Ok(format!("{case}{begin}{rest}{end}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn words(text: &str) -> Vec<String> {
        text.split(' ').map(str::to_owned).collect()
    }

    #[test]
    fn texts_are_cut_at_their_variables() {
        let variable = |name: &str| Piece::Variable(name.to_owned());
        let text = |text: &str| Piece::Text(text.to_owned());
        assert_eq!(
            pieces("a$b-${c}d$1e$"),
            [text("a"), variable("b"), text("-"), variable("c"), text("d"), variable("1"), text("e$")]
        );
        assert_eq!(pieces("no"), [text("no")]);
        assert_eq!(pieces(""), []);
    }

    #[test]
    fn variables_are_names_of_expressions() {
        let mut variables = Variables::default();
        variables.known.insert("tenant".into(), Made::Fixed("acme".into()));
        let made = |text: &str| variables.made(text);
        assert_eq!(
            made("https://$host$request_uri"),
            Ok(Made::Cel("\"https://\" + request.host + request.target".into()))
        );
        assert_eq!(made("x-$tenant"), Ok(Made::Fixed("x-acme".into())));
        assert_eq!(made("$http_x_forwarded_for"), Ok(Made::Cel("request.headers[\"x-forwarded-for\"]".into())));
        assert_eq!(made("$arg_q$cookie_sid"), Ok(Made::Cel("request.args[\"q\"] + request.cookies[\"sid\"]".into())));
        assert_eq!(made("$upstream_http_etag"), Ok(Made::Cel("response.headers[\"etag\"]".into())));
        assert_eq!(made("$connection"), Err("there is nothing like `$connection`".into()));
        for (condition, cel) in [
            ("($request_method = POST)", "request.method == \"POST\""),
            ("($http_x)", "!(request.headers[\"x\"] in [\"\", \"0\"])"),
            ("($host != www.example.com)", "request.host != \"www.example.com\""),
            ("($http_user_agent ~* (bot|crawl))", "request.headers[\"user-agent\"].matches(\"(?i)(bot|crawl)\")"),
            ("($host !~ ^www\\.)", "!request.host.matches(\"^www\\\\.\")"),
            ("($http_cookie = )", "request.headers[\"cookie\"] == \"\""),
        ] {
            assert_eq!(variables.condition(&words(condition)), Ok(cel.to_owned()), "{condition}");
        }
        assert!(variables.condition(&words("(-f $request_filename)")).is_err());
        assert!(variables.condition(&words("($host ~ ^(?!www))")).is_err());
    }

    #[test]
    fn a_pattern_matches_the_whole_path_where_it_matched_a_part() {
        for (pattern, any_case, expected, yes, no) in [
            (r"\.php$", false, r".*\.php", "/a/b.php", "/a.php5"),
            (r"^/api/v[0-9]+", false, r"/api/v[0-9]+.*", "/api/v1/x", "/x/api/v1"),
            (r"^/exact$", false, "/exact", "/exact", "/exact/"),
            (r"\.(png|jpg)$", true, r"(?i).*(?:\.(png|jpg)$).*", "/A.PNG", "/a.pngx"),
            (r"^/a|/b$", false, "(?i)", "/a/x", "/x"),
            (r"admin", false, ".*admin.*", "/x/admin/y", "/adm"),
            (r"^/x/(.*)$", false, "/x/(.*)", "/x/", "/y"),
        ] {
            let made = whole(pattern, any_case).expect("a pattern");
            if expected != "(?i)" {
                assert_eq!(made, expected);
            }
            let whole = Regex::new(&format!(r"\A(?:{made})\z")).expect("a pattern");
            assert!(whole.is_match(yes) && !whole.is_match(no), "{pattern}: {made}");
        }
        assert!(whole("(?=a)", false).is_err());
    }
}
