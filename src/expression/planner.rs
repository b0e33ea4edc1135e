//! Plans a parsed tree: every node gets a type, or a mistake with its place.

use std::collections::HashSet;

use cel::common::ast::{CallExpr, Expr, IdedExpr, LiteralValue};
use http::HeaderName;
use ipnet::IpNet;
use memchr::memmem::Finder;
use regex::Regex;

use super::names::{FUNCTIONS, VARIABLES};
use super::parse::{LOOPS, Tree};
use super::plan::{Address, Comparison, Condition, Double, Field, Int, Network, Number, Split, Text, parsed_address};
use super::{Mistake, Moment, pattern};
use crate::error::nearest;

/// The limit on nested nodes. A chain (`a && b && …`, or `a + b + …` of texts) is one node.
const DEPTH_MAX: usize = 100;
/// The limit on concatenated texts in one expression, which bounds how often it reads the client's input.
const JOINED_MAX: usize = 64;

/// A planned node of any type.
pub(super) enum Plan {
    Condition(Condition),
    Text(Text),
    Int(Int),
    Double(Double),
    Address(Address),
    Network(IpNet),
    Split(Split),
    /// The values of a name.
    Values(Field),
    List(Vec<Plan>),
    Map(Map),
}

/// Something with fields.
#[derive(Clone, Copy, PartialEq)]
pub(super) enum Map {
    Headers,
    Cookies,
    Arguments,
    ResponseHeaders,
    Claims,
}

/// The type of a node.
#[derive(Clone, Copy, PartialEq)]
pub(super) enum Kind {
    Bool,
    Text,
    Int,
    Double,
    Address,
    Network,
    List,
    Map,
}

impl Kind {
    /// Its name in errors.
    pub fn told(self) -> &'static str {
        match self {
            Kind::Bool => "a condition (bool)",
            Kind::Text => "text (string)",
            Kind::Int => "a whole number (int)",
            Kind::Double => "a number (double)",
            Kind::Address => "an address (ip)",
            Kind::Network => "a network (cidr)",
            Kind::List => "a list",
            Kind::Map => "a map",
        }
    }
}

impl Plan {
    pub fn kind(&self) -> Kind {
        match self {
            Plan::Condition(_) => Kind::Bool,
            Plan::Text(_) => Kind::Text,
            Plan::Int(_) => Kind::Int,
            Plan::Double(_) => Kind::Double,
            Plan::Address(_) => Kind::Address,
            Plan::Network(_) => Kind::Network,
            Plan::Split(_) | Plan::Values(_) | Plan::List(_) => Kind::List,
            Plan::Map(_) => Kind::Map,
        }
    }

    /// How it is written, as text.
    ///
    /// # Errors
    /// Its type, which cannot be converted to text.
    pub fn shown(self) -> Result<Text, Kind> {
        Ok(match self {
            Plan::Text(text) => text,
            Plan::Int(int) => Text::OfInt(Box::new(int)),
            Plan::Double(double) => Text::OfDouble(Box::new(double)),
            Plan::Condition(condition) => Text::OfCondition(Box::new(condition)),
            Plan::Address(address) => Text::OfAddress(Box::new(address)),
            other => return Err(other.kind()),
        })
    }

    /// Its literal text, if it is a literal.
    fn literal(&self) -> Option<&str> {
        match self {
            Plan::Text(Text::Literal(text)) => std::str::from_utf8(text).ok(),
            _ => None,
        }
    }
}

type Planned<T = Plan> = Result<T, Mistake>;

/// Plans one expression.
pub(super) struct Planner<'t> {
    tree: &'t Tree<'t>,
    moment: Moment,
    depth: usize,
    joined: usize,
    /// The expression reads the response.
    pub reads_response: bool,
}

impl<'t> Planner<'t> {
    pub fn new(tree: &'t Tree<'t>, moment: Moment) -> Self {
        Planner { tree, moment, depth: 0, joined: 0, reads_response: false }
    }

    /// Plans a node and its children.
    pub fn plan(&mut self, at: &IdedExpr) -> Planned {
        self.depth += 1;
        if self.depth > DEPTH_MAX {
            let told = format!("this is nested more than {DEPTH_MAX} deep: split the expression, or write a filter");
            return self.wrong(at, told);
        }
        let planned = match &at.expr {
            Expr::Literal(literal) => self.literal(at, literal),
            Expr::Ident(_) | Expr::Select(_) => self.name(at),
            Expr::Call(call) => self.call(at, call),
            Expr::List(list) => {
                if !list.optional_indices.is_empty() {
                    return self.wrong(at, "`?` has no meaning in a list: what is missing reads as an empty text");
                }
                let items: Vec<Plan> = list.elements.iter().map(|item| self.plan(item)).collect::<Result<_, _>>()?;
                Ok(Plan::List(items))
            }
            Expr::Comprehension(_) => self.wrong(at, LOOPS),
            Expr::Map(_) | Expr::Struct(_) => {
                self.wrong(at, "maps cannot be written here: use `a ? b : c`, or several rules with a `when` each")
            }
            Expr::Unspecified => self.wrong(at, "this is not understood"),
        };
        self.depth -= 1;
        planned
    }

    fn wrong<T>(&self, at: &IdedExpr, told: impl Into<String>) -> Planned<T> {
        Err(Mistake::new(self.tree.place(at), told))
    }

    /// The name of an operand in errors: its source text.
    fn shown(&self, at: &IdedExpr) -> &str {
        self.tree.text(self.tree.place(at))
    }

    /// The error for an operand of the wrong type at `at`.
    fn mistyped<T>(&self, at: &IdedExpr, found: Kind, expected: &str) -> Planned<T> {
        self.wrong(at, format!("`{}` is {}: expected {expected}", self.shown(at), found.told()))
    }

    fn literal(&self, at: &IdedExpr, literal: &LiteralValue) -> Planned {
        Ok(match literal {
            LiteralValue::Boolean(truth) => Plan::Condition(Condition::Literal(*truth.inner())),
            LiteralValue::Int(number) => Plan::Int(Int::Literal(*number.inner())),
            LiteralValue::Double(number) => Plan::Double(Double::Literal(*number.inner())),
            LiteralValue::String(text) => Plan::Text(Text::Literal(text.inner().as_bytes().into())),
            LiteralValue::UInt(_) => {
                return self.wrong(at, "numbers without a sign are not offered: leave the `u` out");
            }
            LiteralValue::Bytes(_) => {
                return self.wrong(at, "bytes are not offered: leave the `b` out, text may hold any");
            }
            LiteralValue::Null => return self.wrong(at, "there is no `null`: what is missing reads as an empty text"),
        })
    }

    /// `a.b.c`, and selections from maps.
    fn name(&mut self, at: &IdedExpr) -> Planned {
        if let Expr::Select(select) = &at.expr {
            if let Some(map) = self.map_at(&select.operand)? {
                let field = self.field(at, map, &select.field, false)?;
                return Ok(if select.test {
                    Plan::Condition(Condition::Has(field))
                } else {
                    Plan::Text(Text::Field(field))
                });
            }
            if select.test {
                let told = "`has` asks for a field of `request.headers`, `request.cookies`, `request.args`, \
                            `jwt.claims` or `response.headers`: everything else is always there";
                return self.wrong(at, told);
            }
        }
        let Some(name) = spelt(at) else {
            let Expr::Select(select) = &at.expr else { return self.wrong(at, "this is not understood") };
            let told = format!("`{}` has no fields: names begin with `request`, `source` or the like", select.field);
            return Err(Mistake::new(self.tree.field_of(at), told));
        };
        self.variable(at, &name)
    }

    fn variable(&mut self, at: &IdedExpr, name: &str) -> Planned {
        if name.starts_with("response.") && VARIABLES.iter().any(|known| known.name == name) {
            if self.moment < Moment::Response {
                let told = format!("`{name}` comes too early: there is no response yet where this is asked");
                return self.wrong(at, told);
            }
            self.reads_response = true;
        }
        if self.moment < Moment::Request
            && ["auth.", "jwt."].iter().any(|root| name.starts_with(root))
            && VARIABLES.iter().any(|known| known.name == name)
        {
            let told =
                format!("`{name}` comes too early: filters find out who asks, and they run when a route is found");
            return self.wrong(at, told);
        }
        Ok(match name {
            "request.method" => Plan::Text(Text::Method),
            "request.path" => Plan::Text(Text::Path),
            "request.target" => Plan::Text(Text::Target),
            "request.query" => Plan::Text(Text::Query),
            "request.host" => Plan::Text(Text::Host),
            "request.scheme" => Plan::Text(Text::Scheme),
            "request.version" => Plan::Text(Text::Version),
            "request.id" => Plan::Text(Text::Id),
            "request.time" => Plan::Int(Int::Time),
            "request.size" => Plan::Int(Int::Size),
            "request.headers" => Plan::Map(Map::Headers),
            "request.cookies" => Plan::Map(Map::Cookies),
            "request.args" => Plan::Map(Map::Arguments),
            "source.address" => Plan::Address(Address::Client),
            "source.network" => Plan::Text(Text::Network),
            "source.port" => Plan::Int(Int::Port),
            "connection.tls_version" => Plan::Text(Text::TlsVersion),
            "connection.listener" => Plan::Text(Text::Listener),
            "connection.sni" => Plan::Text(Text::Sni),
            "connection.peer_subject" => Plan::Text(Text::PeerSubject),
            "connection.peer_names" => Plan::Values(Field::PeerNames),
            "connection.peer_fingerprint" => Plan::Text(Text::PeerFingerprint),
            "route.name" => Plan::Text(Text::Route),
            "auth.user" => Plan::Text(Text::User),
            "auth.by" => Plan::Text(Text::Authenticator),
            "jwt.claims" => Plan::Map(Map::Claims),
            "response.code" => Plan::Int(Int::Code),
            "response.headers" => Plan::Map(Map::ResponseHeaders),
            "response.reason" => Plan::Text(Text::Reason),
            "response.message" => Plan::Text(Text::Message),
            "client.phase_age" => Plan::Double(Double::PhaseAge),
            "client.rate" => Plan::Double(Double::Rate),
            "client.slow" => Plan::Condition(Condition::IsSlow),
            _ => return self.unknown(at, name),
        })
    }

    fn unknown(&self, at: &IdedExpr, name: &str) -> Planned {
        let below = |prefix: &str| {
            let fields = VARIABLES.iter().filter_map(|known| known.name.strip_prefix(prefix)?.strip_prefix('.'));
            fields.map(|field| format!("`{prefix}.{field}`")).collect::<Vec<_>>()
        };
        let roots: Vec<&str> = roots().collect();
        if let Some(known) = VARIABLES.iter().find(|known| name.starts_with(&format!("{}.", known.name))) {
            let told =
                format!("`{}` has no fields: functions are called with brackets, as in `{0}.size()`", known.name);
            return self.wrong(at, told);
        }
        let near = match name.split_once('.').filter(|(root, _)| roots.contains(root)) {
            Some((root, field)) => {
                let fields = VARIABLES.iter().filter_map(|known| known.name.strip_prefix(root)?.strip_prefix('.'));
                nearest(field, fields).map(|field| format!("{root}.{field}"))
            }
            None => nearest(name, VARIABLES.iter().map(|known| known.name)).map(str::to_owned),
        };
        let help = if let Some(near) = near.filter(|_| !roots.contains(&name)) {
            format!("did you mean `{near}`?")
        } else if roots.contains(&name) {
            format!("name a field of it, one of {}", below(name).join(", "))
        } else if let Some((root, _)) = name.split_once('.').filter(|(root, _)| roots.contains(root)) {
            format!("there are {}", below(root).join(", "))
        } else {
            format!("names begin with `{}`; text stands in quotes", roots.join("`, `"))
        };
        self.wrong(at, format!("nothing is called `{name}`: {help}"))
    }

    /// The map that a node refers to, if it does.
    fn map_at(&mut self, at: &IdedExpr) -> Planned<Option<Map>> {
        let Some(name) = spelt(at) else { return Ok(None) };
        if !VARIABLES.iter().any(|known| known.name == name && known.kind == "map") {
            return Ok(None);
        }
        match self.variable(at, &name)? {
            Plan::Map(map) => Ok(Some(map)),
            _ => Ok(None),
        }
    }

    fn field(&self, at: &IdedExpr, map: Map, name: &str, quoted: bool) -> Planned<Field> {
        let header =
            || HeaderName::try_from(name).or_else(|_| self.wrong(at, format!("`{name}` is not a valid header name")));
        Ok(match map {
            Map::Headers => Field::Header(header()?),
            Map::ResponseHeaders => Field::ResponseHeader(header()?),
            Map::Cookies => {
                // RFC 6265 §4.1.1: the name of a cookie is a token, like that of a header.
                if HeaderName::try_from(name).is_err() {
                    return self.wrong(at, format!("`{name}` is not a valid cookie name"));
                }
                Field::Cookie(name.as_bytes().into())
            }
            Map::Claims => Field::Claim(name.as_bytes().into()),
            Map::Arguments if name.is_empty() && quoted => return self.wrong(at, "an argument needs a name"),
            Map::Arguments => Field::Argument(name.as_bytes().into()),
        })
    }

    fn call(&mut self, at: &IdedExpr, call: &CallExpr) -> Planned {
        match (call.func_name.as_str(), &call.target, call.args.as_slice()) {
            ("_&&_", None, _) => Ok(Plan::Condition(Condition::All(Condition::in_order(self.row(at, "_&&_")?)))),
            ("_||_", None, _) => Ok(Plan::Condition(Condition::Any(Condition::in_order(self.row(at, "_||_")?)))),
            ("!_", None, [of]) => Ok(Plan::Condition(Condition::Not(Box::new(self.condition(of)?)))),
            ("-_", None, [of]) => self.negate(of),
            ("_?_:_", None, [condition, yes, no]) => self.choice(at, condition, yes, no),
            ("_==_", None, [a, b]) => self.equal(a, b),
            ("_!=_", None, [a, b]) => Ok(match self.equal(a, b)? {
                Plan::Condition(equal) => Plan::Condition(Condition::Not(Box::new(equal))),
                other => other,
            }),
            ("_<_", None, [a, b]) => self.compare(Comparison::Less, a, b),
            ("_<=_", None, [a, b]) => self.compare(Comparison::LessEqual, a, b),
            ("_>_", None, [a, b]) => self.compare(Comparison::Greater, a, b),
            ("_>=_", None, [a, b]) => self.compare(Comparison::GreaterEqual, a, b),
            ("_+_", None, [a, b]) => self.add(at, a, b),
            ("_-_" | "_*_" | "_/_" | "_%_", None, [a, b]) => self.arithmetic(at, &call.func_name, a, b),
            ("_[_]", None, [of, index]) => self.index(at, of, index),
            ("@in", None, [one, all]) => self.one_of(one, all),
            ("all" | "exists" | "exists_one" | "map" | "filter", Some(_), _) => self.wrong(at, LOOPS),
            _ => self.function(at, call),
        }
    }

    /// The terms of `a && b && …`, which the parser returns as a tree.
    fn row(&mut self, at: &IdedExpr, operator: &str) -> Planned<Vec<Condition>> {
        let (mut terms, mut open) = (Vec::new(), vec![at]);
        while let Some(next) = open.pop() {
            match &next.expr {
                Expr::Call(call) if call.func_name == operator && call.target.is_none() => {
                    open.extend(call.args.iter().rev());
                }
                _ => terms.push(self.condition(next)?),
            }
        }
        Ok(terms)
    }

    fn condition(&mut self, at: &IdedExpr) -> Planned<Condition> {
        match self.plan(at)? {
            Plan::Condition(condition) => Ok(condition),
            other => self.mistyped(at, other.kind(), "a condition, such as `request.method == \"GET\"`"),
        }
    }

    fn text(&mut self, at: &IdedExpr) -> Planned<Text> {
        match self.plan(at)? {
            Plan::Text(text) => Ok(text),
            other => self.mistyped(at, other.kind(), "text"),
        }
    }

    fn int(&mut self, at: &IdedExpr) -> Planned<Int> {
        match self.plan(at)? {
            Plan::Int(int) => Ok(int),
            other => self.mistyped(at, other.kind(), "a whole number"),
        }
    }

    fn negate(&mut self, of: &IdedExpr) -> Planned {
        match self.plan(of)? {
            Plan::Int(int) => Ok(Plan::Int(Int::Negate(Box::new(int)))),
            Plan::Double(double) => Ok(Plan::Double(Double::Negate(Box::new(double)))),
            other => self.mistyped(of, other.kind(), "a number behind `-`"),
        }
    }

    fn choice(&mut self, at: &IdedExpr, condition: &IdedExpr, yes: &IdedExpr, no: &IdedExpr) -> Planned {
        let condition = self.condition(condition)?;
        Ok(match (self.plan(yes)?, self.plan(no)?) {
            (Plan::Condition(a), Plan::Condition(b)) => Plan::Condition(Condition::Choice(Box::new((condition, a, b)))),
            (Plan::Text(a), Plan::Text(b)) => Plan::Text(Text::Choice(Box::new((condition, a, b)))),
            (Plan::Int(a), Plan::Int(b)) => Plan::Int(Int::Choice(Box::new((condition, a, b)))),
            (Plan::Double(a), Plan::Double(b)) => Plan::Double(Double::Choice(Box::new((condition, a, b)))),
            (a, b) if a.kind() == b.kind() => {
                return self
                    .wrong(at, format!("`?:` cannot choose between {}: choose text or numbers", two_of(a.kind())));
            }
            (a, b) => {
                let (a, b) = (a.kind().told(), b.kind().told());
                return self.wrong(at, format!("`?:` gives {a} or {b}: make both sides of one type"));
            }
        })
    }

    fn equal(&mut self, a: &IdedExpr, b: &IdedExpr) -> Planned {
        let (one, other) = (self.plan(a)?, self.plan(b)?);
        Ok(Plan::Condition(match (one, other) {
            (Plan::Text(text), Plan::Text(Text::Literal(literal)))
            | (Plan::Text(Text::Literal(literal)), Plan::Text(text)) => Condition::Is(text, literal),
            (Plan::Text(one), Plan::Text(other)) => Condition::Equal(Box::new([one, other])),
            (Plan::Condition(one), Plan::Condition(other)) => Condition::Same(Box::new([one, other])),
            (Plan::Address(one), Plan::Address(other)) => Condition::SameAddress(Box::new([one, other])),
            (Plan::Address(one), other) if other.literal().is_some() => {
                Condition::SameAddress(Box::new([one, self.address_of(b, other)?]))
            }
            (one, Plan::Address(other)) if one.literal().is_some() => {
                Condition::SameAddress(Box::new([self.address_of(a, one)?, other]))
            }
            (one, other) => match (number(one), number(other)) {
                (Ok(one), Ok(other)) => Condition::Number(Comparison::Equal, Box::new([one, other])),
                (one, other) => return self.incomparable(a, b, kind_of(&one), kind_of(&other)),
            },
        }))
    }

    fn compare(&mut self, comparison: Comparison, a: &IdedExpr, b: &IdedExpr) -> Planned {
        let (one, other) = (self.plan(a)?, self.plan(b)?);
        Ok(Plan::Condition(match (one, other) {
            (Plan::Text(one), Plan::Text(other)) => Condition::Compare(comparison, Box::new([one, other])),
            (one, other) => match (number(one), number(other)) {
                (Ok(one), Ok(other)) => Condition::Number(comparison, Box::new([one, other])),
                (one, other) => return self.incomparable(a, b, kind_of(&one), kind_of(&other)),
            },
        }))
    }

    fn incomparable<T>(&self, a: &IdedExpr, b: &IdedExpr, one: Kind, other: Kind) -> Planned<T> {
        let (from, to) = (self.tree.place(a), self.tree.place(b));
        let place = from.start.min(to.start)..from.end.max(to.end);
        if one == other {
            return Err(Mistake::new(place, format!("{} cannot be compared in this way", two_of(one))));
        }
        let help = match (one, other) {
            (Kind::Text, Kind::Int) | (Kind::Int, Kind::Text) => {
                ": write the number in quotes, or `int(…)` around the text"
            }
            (Kind::Text, Kind::Double) | (Kind::Double, Kind::Text) => ": write `double(…)` around the text",
            (Kind::Text, Kind::Address) | (Kind::Address, Kind::Text) => ": write `ip(…)` around the text",
            (Kind::Map, _) | (_, Kind::Map) => ": name a field, as in `request.headers[\"x-user\"]`",
            _ => "",
        };
        let (one, other) = (one.told(), other.told());
        let told =
            format!("`{}` is {one} and `{}` {other}, which are never the same{help}", self.shown(a), self.shown(b));
        Err(Mistake::new(place, told))
    }

    /// Numbers are added one by one, but the texts of a chain all at once.
    fn add(&mut self, at: &IdedExpr, a: &IdedExpr, b: &IdedExpr) -> Planned {
        let mut row = vec![b];
        let mut first = a;
        while let Expr::Call(CallExpr { func_name, target: None, args }) = &first.expr
            && let ("_+_", [inner, last]) = (func_name.as_str(), args.as_slice())
        {
            row.push(last);
            first = inner;
        }
        row.push(first);
        row.reverse();
        let mut sum = self.plan(row[0])?;
        let mut texts = Vec::new();
        for next in &row[1..] {
            let other = self.plan(next)?;
            sum = match (sum, other) {
                (Plan::Text(one), Plan::Text(other)) => {
                    if texts.is_empty() {
                        texts.push(one);
                    }
                    texts.push(other);
                    // A placeholder for the texts that were collected.
                    Plan::Text(Text::Literal(Box::default()))
                }
                (Plan::Int(one), Plan::Int(other)) => {
                    self.deeper(at)?;
                    Plan::Int(Int::Add(Box::new([one, other])))
                }
                (Plan::Double(one), Plan::Double(other)) => {
                    self.deeper(at)?;
                    Plan::Double(Double::Add(Box::new([one, other])))
                }
                (one, other) => return self.unfit("+", next, &one, &other),
            };
        }
        if let Plan::Int(_) | Plan::Double(_) = sum {
            self.depth -= row.len() - 1;
        }
        if texts.is_empty() {
            return Ok(sum);
        }
        self.joined += texts.len();
        if self.joined > JOINED_MAX {
            let told = format!("more than {JOINED_MAX} texts are put together here: split the expression");
            return self.wrong(at, told);
        }
        Ok(Plan::Text(Text::Join(texts.into())))
    }

    /// A chain of numbers is as deep as it is long.
    fn deeper(&mut self, at: &IdedExpr) -> Planned<()> {
        self.depth += 1;
        if self.depth > DEPTH_MAX {
            return self.wrong(at, format!("more than {DEPTH_MAX} numbers stand in a row here: split the expression"));
        }
        Ok(())
    }

    fn arithmetic(&mut self, at: &IdedExpr, operator: &str, a: &IdedExpr, b: &IdedExpr) -> Planned {
        self.no_dash_in_a_name(operator, a, b)?;
        let sign = operator.trim_matches('_');
        match (self.plan(a)?, self.plan(b)?) {
            (Plan::Int(_), Plan::Int(Int::Literal(0))) if matches!(sign, "/" | "%") => {
                self.wrong(at, "a division by zero: it would always give 0")
            }
            (Plan::Int(one), Plan::Int(other)) => {
                let both = Box::new([one, other]);
                Ok(Plan::Int(match sign {
                    "-" => Int::Subtract(both),
                    "*" => Int::Multiply(both),
                    "/" => Int::Divide(both),
                    _ => Int::Remainder(both),
                }))
            }
            (Plan::Double(one), Plan::Double(other)) if sign != "%" => {
                let both = Box::new([one, other]);
                Ok(Plan::Double(match sign {
                    "-" => Double::Subtract(both),
                    "*" => Double::Multiply(both),
                    _ => Double::Divide(both),
                }))
            }
            (one, other) => self.unfit(sign, b, &one, &other),
        }
    }

    /// `request.headers.x-user` means `request.headers.x` minus `user`, which is never intended.
    fn no_dash_in_a_name(&mut self, operator: &str, a: &IdedExpr, b: &IdedExpr) -> Planned<()> {
        let mut left = a;
        while let Expr::Call(CallExpr { func_name, target: None, args }) = &left.expr
            && let ("_-_", [inner, _]) = (func_name.as_str(), args.as_slice())
        {
            left = inner;
        }
        if let ("_-_", Expr::Select(select), Expr::Ident(_)) = (operator, &left.expr, &b.expr)
            && let Some(map) = spelt(&select.operand)
            && self.map_at(&select.operand)?.is_some()
        {
            let (from, to) = (self.tree.field_of(left), self.tree.place(b));
            let name = self.tree.text(from.start..to.end);
            let told = format!("`-` is a minus here: for a name with a `-`, write `{map}[\"{name}\"]`");
            return Err(Mistake::new(from.start..to.end, told));
        }
        Ok(())
    }

    fn unfit<T>(&self, sign: &str, at: &IdedExpr, one: &Plan, other: &Plan) -> Planned<T> {
        let help = match (one.kind(), other.kind()) {
            (Kind::Int, Kind::Double) | (Kind::Double, Kind::Int) => "write `double(…)` around the whole number",
            (Kind::Text, _) | (_, Kind::Text) if sign == "+" => "write `string(…)` around what is not text",
            _ => "it takes two numbers of one kind",
        };
        let (one, other) = (one.kind().told(), other.kind().told());
        self.wrong(at, format!("`{sign}` does not take {one} and {other}: {help}"))
    }

    fn index(&mut self, at: &IdedExpr, of: &IdedExpr, index: &IdedExpr) -> Planned {
        match self.plan(of)? {
            Plan::Map(map) => {
                let name = self.key(index, "this is named by a literal, so that it is looked up once")?;
                Ok(Plan::Text(Text::Field(self.field(index, map, &name, true)?)))
            }
            Plan::Split(split) => {
                let number = self.int(index)?;
                if let Int::Literal(..0) = number {
                    return self.wrong(index, "items are counted from 0");
                }
                Ok(Plan::Text(Text::Item(Box::new((split, number)))))
            }
            Plan::Values(field) => {
                let number = self.int(index)?;
                if let Int::Literal(..0) = number {
                    return self.wrong(index, "items are counted from 0");
                }
                Ok(Plan::Text(Text::Value(Box::new((field, number)))))
            }
            Plan::List(_) => self.wrong(at, "an item of a list that is written here: write the item itself"),
            other => self.mistyped(
                of,
                other.kind(),
                "`request.headers`, `request.cookies`, `request.args`, `jwt.claims` or what `split` gives before `[`",
            ),
        }
    }

    /// A name in quotes.
    fn key(&mut self, at: &IdedExpr, told: &str) -> Planned<String> {
        let plan = self.plan(at)?;
        match plan.literal() {
            Some(name) => Ok(name.to_owned()),
            None => self.wrong(at, format!("{told}: write it in quotes")),
        }
    }

    fn one_of(&mut self, one: &IdedExpr, all: &IdedExpr) -> Planned {
        let list = self.plan(all)?;
        let item = self.plan(one)?;
        Ok(Plan::Condition(match (item, list) {
            (item, Plan::Map(map)) => match item.literal() {
                Some(name) => Condition::Has(self.field(one, map, name, true)?),
                None => {
                    return self
                        .wrong(one, "this is named by a literal, so that it is looked up once: write it in quotes");
                }
            },
            (Plan::Text(item), Plan::Split(split)) => Condition::Listed(item, Box::new(split)),
            (Plan::Text(item), Plan::Values(field)) => Condition::Among(item, Box::new(field)),
            (Plan::Text(item), Plan::List(items)) => {
                let text = |(at, plan): (&IdedExpr, Plan)| match plan {
                    Plan::Text(text) => Ok(text),
                    other => self.mistyped(at, other.kind(), "text, as the one that is looked for"),
                };
                Condition::OneOf(item, elements(all).iter().zip(items).map(text).collect::<Result<_, _>>()?)
            }
            (Plan::Address(item), Plan::List(items)) => {
                let address = |(at, plan): (&IdedExpr, Plan)| self.address_of(at, plan);
                Condition::AddressOneOf(item, elements(all).iter().zip(items).map(address).collect::<Result<_, _>>()?)
            }
            (item, Plan::List(items)) => {
                let kind = item.kind();
                let Ok(item) = number(item) else {
                    return self.mistyped(one, kind, "text, a number or an address before `in`");
                };
                let other = |(at, plan): (&IdedExpr, Plan)| {
                    number(plan)
                        .or_else(|plan| self.mistyped(at, plan.kind(), "a number, as the one that is looked for"))
                };
                Condition::NumberOneOf(item, elements(all).iter().zip(items).map(other).collect::<Result<_, _>>()?)
            }
            (Plan::Text(_), Plan::Text(_)) => {
                let told = format!(
                    "`in` asks a list: for a part of a text, write `{}.contains({})`",
                    self.shown(all),
                    self.shown(one)
                );
                return self.wrong(all, told);
            }
            (Plan::Address(_), Plan::Network(_)) => {
                let told = format!("`in` asks a list: write `{}.containsIP({})`", self.shown(all), self.shown(one));
                return self.wrong(all, told);
            }
            (_, list) => {
                return self.mistyped(all, list.kind(), "a list, or a map such as `request.headers`, behind `in`");
            }
        }))
    }

    /// An address, or a literal address.
    fn address_of(&self, at: &IdedExpr, plan: Plan) -> Planned<Address> {
        let literal = plan.literal().map(|text| (text.to_owned(), parsed_address(text.as_bytes())));
        match (plan, literal) {
            (Plan::Address(address), _) => Ok(address),
            (_, Some((_, Some(address)))) => Ok(Address::Literal(address)),
            (_, Some((text, None))) => {
                self.wrong(at, format!("`{text}` is not an address: write one such as `192.0.2.1` or `2001:db8::1`"))
            }
            (Plan::Text(text), None) => Ok(Address::Parse(text)),
            (other, None) => self.mistyped(at, other.kind(), "an address"),
        }
    }

    fn function(&mut self, at: &IdedExpr, call: &CallExpr) -> Planned {
        if let Some(name) = self.in_a_namespace(call) {
            return self.named(at, &name, call.args.iter().collect());
        }
        // In CEL, a function can be called on its first argument.
        let args: Vec<&IdedExpr> = call.target.as_deref().into_iter().chain(&call.args).collect();
        self.named(at, &call.func_name, args)
    }

    /// `base64.encode` is one name, not a call on a `base64`.
    fn in_a_namespace(&self, call: &CallExpr) -> Option<String> {
        let Expr::Ident(space) = &call.target.as_ref()?.expr else { return None };
        FUNCTIONS
            .iter()
            .any(|known| known.name.starts_with(&format!("{space}.")))
            .then(|| format!("{space}.{}", call.func_name))
    }

    fn named(&mut self, at: &IdedExpr, name: &str, args: Vec<&IdedExpr>) -> Planned {
        Ok(match (name, args.as_slice()) {
            ("startsWith", [of, with]) => Plan::Condition(Condition::StartsWith(self.texts([of, with])?)),
            ("endsWith", [of, with]) => Plan::Condition(Condition::EndsWith(self.texts([of, with])?)),
            ("contains", [of, part]) => {
                let [of, part] = *self.texts([of, part])?;
                Plan::Condition(match part {
                    Text::Literal(part) => Condition::ContainsLiteral(of, Box::new(Finder::new(&part).into_owned())),
                    part => Condition::Contains(Box::new([of, part])),
                })
            }
            ("matches", [of, pattern]) => {
                let of = self.text(of)?;
                Plan::Condition(Condition::Matches(of, Box::new(self.pattern(pattern)?)))
            }
            ("lowerAscii", [of]) => Plan::Text(Text::Lower(Box::new(self.text(of)?))),
            ("upperAscii", [of]) => Plan::Text(Text::Upper(Box::new(self.text(of)?))),
            ("trim", [of]) => Plan::Text(Text::Trim(Box::new(self.text(of)?))),
            ("replace", [of, old, new]) => {
                let parts = [self.text(of)?, self.text(old)?, self.text(new)?];
                Plan::Text(Text::Replace(Box::new(parts)))
            }
            ("substring", [of, from]) => Plan::Text(Text::Substring(Box::new((self.text(of)?, self.int(from)?, None)))),
            ("substring", [of, from, to]) => {
                let parts = (self.text(of)?, self.int(from)?, Some(self.int(to)?));
                Plan::Text(Text::Substring(Box::new(parts)))
            }
            ("split", [of, by]) => Plan::Split(Split { of: self.text(of)?, by: self.text(by)? }),
            ("values", [of, name]) => {
                let Plan::Map(map) = self.plan(of)? else {
                    let told = "`values` asks `request.headers`, `request.cookies`, `request.args`, \
                                `jwt.claims` or `response.headers`, as in `\"1\" in request.args.values(\"debug\")`";
                    return self.wrong(of, told);
                };
                let written = self.key(name, "this is named by a literal, so that it is looked up once")?;
                Plan::Values(self.field(name, map, &written, true)?)
            }
            ("size", [of]) => Plan::Int(match self.plan(of)? {
                Plan::Text(text) => Int::Length(Box::new(text)),
                Plan::Split(split) => Int::Items(Box::new(split)),
                Plan::Values(field) => Int::Values(Box::new(field)),
                Plan::List(items) => Int::Literal(i64::try_from(items.len()).unwrap_or(i64::MAX)),
                other => return self.mistyped(of, other.kind(), "text or a list"),
            }),
            ("orValue", [of, other]) => Plan::Text(Text::OrValue(self.texts([of, other])?)),
            ("int", [of]) => Plan::Int(match self.plan(of)? {
                Plan::Int(int) => int,
                Plan::Double(double) => Int::OfDouble(Box::new(double)),
                Plan::Text(text) => Int::Parse(Box::new(text)),
                other => return self.mistyped(of, other.kind(), "text or a number"),
            }),
            ("double", [of]) => Plan::Double(match self.plan(of)? {
                Plan::Double(double) => double,
                Plan::Int(int) => Double::OfInt(Box::new(int)),
                Plan::Text(text) => Double::Parse(Box::new(text)),
                other => return self.mistyped(of, other.kind(), "text or a number"),
            }),
            ("string", [of]) => match self.plan(of)?.shown() {
                Ok(text) => Plan::Text(text),
                Err(kind) => return self.mistyped(of, kind, "a number, a condition or an address"),
            },
            ("hash", [of]) => Plan::Int(match self.plan(of)? {
                Plan::Text(text) => Int::Hash(Box::new(text)),
                Plan::Address(address) => Int::HashAddress(Box::new(address)),
                other => return self.mistyped(of, other.kind(), "text or an address"),
            }),
            ("ip", [of]) => {
                let plan = self.plan(of)?;
                Plan::Address(self.address_of(of, plan)?)
            }
            ("isIP", [of]) => Plan::Condition(Condition::IsAddress(self.text(of)?)),
            ("cidr", [of]) => {
                let written = self.key(of, "a network is a literal, so that it is read once")?;
                Plan::Network(self.network(of, &written)?)
            }
            ("containsIP", [network, address]) => {
                let Plan::Network(within) = self.plan(network)? else {
                    return self.wrong(
                        network,
                        "`containsIP` asks a network, as in `cidr(\"10.0.0.0/8\").containsIP(source.address)`",
                    );
                };
                let plan = self.plan(address)?;
                Plan::Condition(Condition::Within(Network::new(within), self.address_of(address, plan)?))
            }
            ("base64.encode", [of]) => Plan::Text(Text::Encode(Box::new(self.text(of)?))),
            ("base64.decode", [of]) => Plan::Text(Text::Decode(Box::new(self.text(of)?))),
            _ => return self.no_such_call(at, name),
        })
    }

    fn no_such_call(&self, at: &IdedExpr, name: &str) -> Planned {
        let place = self.tree.name_of(at);
        let known = FUNCTIONS.iter().find(|known| known.name == name);
        Err(Mistake::new(
            place,
            match known {
                Some(known) => format!("`{name}` does not take these arguments: it is `{}`", known.form),
                None => match nearest(name, FUNCTIONS.iter().map(|known| known.name)) {
                    Some(near) => format!("there is no function `{name}`: did you mean `{near}`?"),
                    None => {
                        let names: HashSet<&str> = FUNCTIONS.iter().map(|known| known.name).collect();
                        let mut names: Vec<&str> = names.into_iter().collect();
                        names.sort_unstable();
                        format!("there is no function `{name}`: there are `{}`", names.join("`, `"))
                    }
                },
            },
        ))
    }

    fn texts(&mut self, [a, b]: [&IdedExpr; 2]) -> Planned<Box<[Text; 2]>> {
        Ok(Box::new([self.text(a)?, self.text(b)?]))
    }

    fn pattern(&mut self, at: &IdedExpr) -> Planned<Regex> {
        let written = self.key(at, "a pattern is a literal, so that it is compiled once")?;
        pattern::compile(&written)
            .or_else(|cause| self.wrong(at, format!("`{written}` is not a usable pattern: {cause}")))
    }

    fn network(&self, at: &IdedExpr, written: &str) -> Planned<IpNet> {
        match written.parse::<IpNet>() {
            Ok(network) => Ok(unmapped(network)),
            Err(_) => self
                .wrong(at, format!("`{written}` is not a network: write one such as `10.0.0.0/8` or `2001:db8::/32`")),
        }
    }
}

/// The IPv4 network of an IPv6 network within `::ffff:0:0/96`: the addresses of such clients are looked up as IPv4.
fn unmapped(network: IpNet) -> IpNet {
    let mapped = |network: &ipnet::Ipv6Net| {
        let length = network.prefix_len().checked_sub(96)?;
        ipnet::Ipv4Net::new(network.addr().to_ipv4_mapped()?, length).ok()
    };
    match network {
        IpNet::V6(v6) => mapped(&v6).map_or(network, IpNet::V4),
        IpNet::V4(_) => network,
    }
}

/// The name of a node: `a.b.c`.
fn spelt(at: &IdedExpr) -> Option<String> {
    match &at.expr {
        Expr::Ident(name) => Some(name.clone()),
        Expr::Select(select) if !select.test => Some(format!("{}.{}", spelt(&select.operand)?, select.field)),
        _ => None,
    }
}

/// The first words of names.
fn roots() -> impl Iterator<Item = &'static str> {
    let mut last = "";
    VARIABLES.iter().filter_map(move |known| {
        let root = known.name.split('.').next()?;
        (std::mem::replace(&mut last, root) != root).then_some(root)
    })
}

fn elements(at: &IdedExpr) -> &[IdedExpr] {
    match &at.expr {
        Expr::List(list) => &list.elements,
        _ => &[],
    }
}

fn number(plan: Plan) -> Result<Number, Plan> {
    match plan {
        Plan::Int(int) => Ok(Number::Int(int)),
        Plan::Double(double) => Ok(Number::Double(double)),
        other => Err(other),
    }
}

fn kind_of(number: &Result<Number, Plan>) -> Kind {
    match number {
        Ok(Number::Int(_)) => Kind::Int,
        Ok(Number::Double(_)) => Kind::Double,
        Err(plan) => plan.kind(),
    }
}

/// Two types in words.
fn two_of(kind: Kind) -> &'static str {
    match kind {
        Kind::Bool => "two conditions",
        Kind::Text => "two texts",
        Kind::Int | Kind::Double => "two numbers",
        Kind::Address => "two addresses",
        Kind::Network => "two networks",
        Kind::List => "two lists",
        Kind::Map => "two maps",
    }
}
