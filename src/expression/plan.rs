//! The evaluated form of an expression: a tree of typed nodes with resolved names, compiled patterns and parsed
//! literals.
//!
//! Text is bytes, since a header may contain any, and is borrowed from the request where possible. Patterns and
//! characters use UTF-8: an invalid byte counts as one character, which a pattern sees as U+FFFD.

use std::borrow::Cow;
use std::cmp::Ordering;
use std::net::IpAddr;
use std::time::UNIX_EPOCH;

use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use base64::engine::{DecodePaddingMode, GeneralPurpose, GeneralPurposeConfig};
use http::{HeaderMap, HeaderName, Version, header};
use ipnet::IpNet;
use memchr::memmem::{Finder, find};
use regex::Regex;
use xxhash_rust::xxh3::xxh3_64;

use super::facts::{Asked, Response};
use super::fields::{arguments, cookies, decoded};

/// The limit on growth by `replace`: the result is truncated at this length, unless the input was longer. Otherwise
/// nested calls could produce unbounded text. It is much more than a header of the usual limit becomes if each
/// character is replaced by an escape. A replacement that is not longer than the replaced text has no limit, so that
/// padding cannot keep text from being removed.
pub(super) const REPLACED_BYTES_MAX: usize = 256 * 1024;

/// Text from the request, the file, or a computation.
pub(super) type Bytes<'a> = Cow<'a, [u8]>;

/// A node of type bool.
#[derive(Debug)]
pub(super) enum Condition {
    Literal(bool),
    Not(Box<Condition>),
    All(Box<[Condition]>),
    Any(Box<[Condition]>),
    Choice(Box<(Condition, Condition, Condition)>),
    /// Both are true, or both are false.
    Same(Box<[Condition; 2]>),
    Has(Field),
    IsSlow,
    Equal(Box<[Text; 2]>),
    /// A text and a literal.
    Is(Text, Box<[u8]>),
    Compare(Comparison, Box<[Text; 2]>),
    StartsWith(Box<[Text; 2]>),
    EndsWith(Box<[Text; 2]>),
    Contains(Box<[Text; 2]>),
    ContainsLiteral(Text, Box<Finder<'static>>),
    Matches(Text, Box<Regex>),
    OneOf(Text, Box<[Text]>),
    /// An item of the result of `split`.
    Listed(Text, Box<Split>),
    /// One of the values under a name.
    Among(Text, Box<Field>),
    Number(Comparison, Box<[Number; 2]>),
    NumberOneOf(Number, Box<[Number]>),
    SameAddress(Box<[Address; 2]>),
    AddressOneOf(Address, Box<[Address]>),
    Within(Network, Address),
    IsAddress(Text),
}

/// A network for comparison with addresses.
#[derive(Debug)]
pub(super) enum Network {
    V4 { bits: u32, mask: u32 },
    V6(Box<(u128, u128)>),
}

impl Network {
    pub fn new(network: IpNet) -> Network {
        match network {
            IpNet::V4(v4) => Network::V4 { bits: v4.network().to_bits(), mask: v4.netmask().to_bits() },
            IpNet::V6(v6) => Network::V6(Box::new((v6.network().to_bits(), v6.netmask().to_bits()))),
        }
    }

    fn contains(&self, address: IpAddr) -> bool {
        match (self, address) {
            (Network::V4 { bits, mask }, IpAddr::V4(address)) => address.to_bits() & mask == *bits,
            (Network::V6(network), IpAddr::V6(address)) => address.to_bits() & network.1 == network.0,
            (Network::V4 { .. }, IpAddr::V6(_)) | (Network::V6(_), IpAddr::V4(_)) => false,
        }
    }
}

/// `==`, `<` and the like.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Comparison {
    Equal,
    Less,
    LessEqual,
    Greater,
    GreaterEqual,
}

impl Comparison {
    /// NaN is not equal to anything, and neither less nor greater.
    fn holds(self, order: Option<Ordering>) -> bool {
        match self {
            Comparison::Equal => order == Some(Ordering::Equal),
            Comparison::Less => order == Some(Ordering::Less),
            Comparison::LessEqual => matches!(order, Some(Ordering::Less | Ordering::Equal)),
            Comparison::Greater => order == Some(Ordering::Greater),
            Comparison::GreaterEqual => matches!(order, Some(Ordering::Greater | Ordering::Equal)),
        }
    }
}

/// A named value that may be missing.
#[derive(Debug)]
pub(super) enum Field {
    Header(HeaderName),
    Cookie(Box<[u8]>),
    Argument(Box<[u8]>),
    ResponseHeader(HeaderName),
    /// The alternative names in the client's certificate.
    PeerNames,
    /// A claim of the token that a filter has accepted.
    Claim(Box<[u8]>),
}

/// A node of type string.
#[derive(Debug)]
pub(super) enum Text {
    Literal(Box<[u8]>),
    Method,
    Path,
    Target,
    Query,
    Host,
    Scheme,
    Version,
    Id,
    Route,
    TlsVersion,
    Listener,
    Sni,
    PeerSubject,
    PeerFingerprint,
    Network,
    User,
    Authenticator,
    Reason,
    Message,
    Field(Field),
    /// One of the values under a name.
    Value(Box<(Field, Int)>),
    Lower(Box<Text>),
    Upper(Box<Text>),
    Trim(Box<Text>),
    Join(Box<[Text]>),
    Replace(Box<[Text; 3]>),
    Substring(Box<(Text, Int, Option<Int>)>),
    Item(Box<(Split, Int)>),
    OrValue(Box<[Text; 2]>),
    Encode(Box<Text>),
    Decode(Box<Text>),
    OfInt(Box<Int>),
    OfDouble(Box<Double>),
    OfCondition(Box<Condition>),
    OfAddress(Box<Address>),
    Choice(Box<(Condition, Text, Text)>),
}

/// The pieces of a text between separators.
#[derive(Debug)]
pub(super) struct Split {
    pub of: Text,
    pub by: Text,
}

/// A node of type int.
#[derive(Debug)]
pub(super) enum Int {
    Literal(i64),
    Time,
    Size,
    Port,
    Code,
    Length(Box<Text>),
    Items(Box<Split>),
    Values(Box<Field>),
    Parse(Box<Text>),
    OfDouble(Box<Double>),
    Hash(Box<Text>),
    HashAddress(Box<Address>),
    Negate(Box<Int>),
    Add(Box<[Int; 2]>),
    Subtract(Box<[Int; 2]>),
    Multiply(Box<[Int; 2]>),
    Divide(Box<[Int; 2]>),
    Remainder(Box<[Int; 2]>),
    Choice(Box<(Condition, Int, Int)>),
}

/// A node of type double.
#[derive(Debug)]
pub(super) enum Double {
    Literal(f64),
    PhaseAge,
    Rate,
    Parse(Box<Text>),
    OfInt(Box<Int>),
    Negate(Box<Double>),
    Add(Box<[Double; 2]>),
    Subtract(Box<[Double; 2]>),
    Multiply(Box<[Double; 2]>),
    Divide(Box<[Double; 2]>),
    Choice(Box<(Condition, Double, Double)>),
}

/// A number of either type, for comparison with another one.
#[derive(Debug)]
pub(super) enum Number {
    Int(Int),
    Double(Double),
}

/// A node of type address; the address may be missing.
#[derive(Debug)]
pub(super) enum Address {
    Client,
    Literal(IpAddr),
    Parse(Text),
}

/// The effort of a condition.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Effort {
    /// It reads what is at hand.
    Read,
    /// It looks up a name.
    Look,
    /// It computes, or matches a pattern.
    Compute,
}

impl Condition {
    /// Evaluates the condition.
    ///
    /// Each kind of node is a call in tail position. So this function needs no stack frame, and a node that reads a
    /// word of the request takes few instructions.
    pub fn holds(&self, asked: &Asked<'_>) -> bool {
        match self {
            Condition::Literal(truth) => *truth,
            Condition::Not(condition) => fails(condition, asked),
            Condition::All(all) => all_hold(all, asked),
            Condition::Any(any) => any_holds(any, asked),
            Condition::Choice(choice) => chosen(choice, asked),
            Condition::Same(both) => same(both, asked),
            Condition::Has(field) => field.is_there(asked),
            Condition::IsSlow => asked.is_slow(),
            Condition::Equal(both) => compared(both, asked, |text, other| text == other),
            Condition::Is(text, literal) => read(text, asked, |text| *text == **literal),
            Condition::Compare(comparison, both) => {
                compared(both, asked, |text, other| comparison.holds(Some(text.cmp(other))))
            }
            Condition::StartsWith(both) => compared(both, asked, |text, with| text.starts_with(with)),
            Condition::EndsWith(both) => compared(both, asked, |text, with| text.ends_with(with)),
            Condition::Contains(both) => compared(both, asked, |text, part| find(text, part).is_some()),
            Condition::ContainsLiteral(text, finder) => read(text, asked, |text| finder.find(text).is_some()),
            Condition::Matches(text, pattern) => read(text, asked, |text| matches(text, pattern)),
            Condition::OneOf(text, all) => one_of(text, all, asked),
            Condition::Listed(text, split) => listed_in(text, split, asked),
            Condition::Among(text, field) => among(text, field, asked),
            Condition::Number(comparison, both) => numbers(*comparison, both, asked),
            Condition::NumberOneOf(number, all) => number_one_of(number, all, asked),
            Condition::SameAddress(both) => same_address(both, asked),
            Condition::AddressOneOf(address, all) => address_one_of(address, all, asked),
            Condition::Within(network, address) => within(network, address, asked),
            Condition::IsAddress(text) => read(text, asked, |text| parsed_address(text).is_some()),
        }
    }

    /// The operands of `&&` or `||` in the order of evaluation: those with the least effort first. The order does not
    /// change the result, since a condition changes nothing and cannot fail.
    pub fn in_order(mut operands: Vec<Condition>) -> Box<[Condition]> {
        operands.sort_by_key(Condition::effort);
        operands.into()
    }

    fn effort(&self) -> Effort {
        let most = |all: &[Condition]| all.iter().map(Condition::effort).max().unwrap_or(Effort::Read);
        match self {
            Condition::Literal(_) | Condition::IsSlow => Effort::Read,
            Condition::Not(condition) => condition.effort(),
            Condition::All(all) | Condition::Any(all) => most(all),
            Condition::Same(both) => most(&**both),
            Condition::Has(_) => Effort::Look,
            Condition::Equal(both)
            | Condition::Compare(_, both)
            | Condition::StartsWith(both)
            | Condition::EndsWith(both) => both[0].effort().max(both[1].effort()),
            Condition::Is(text, _) => text.effort(),
            Condition::OneOf(text, all) => all.iter().map(Text::effort).fold(text.effort(), Effort::max),
            Condition::Within(_, Address::Client | Address::Literal(_)) => Effort::Read,
            _ => Effort::Compute,
        }
    }
}

#[inline(never)]
fn fails(condition: &Condition, asked: &Asked<'_>) -> bool {
    !condition.holds(asked)
}

#[inline(never)]
fn all_hold(all: &[Condition], asked: &Asked<'_>) -> bool {
    all.iter().all(|one| one.holds(asked))
}

#[inline(never)]
fn any_holds(any: &[Condition], asked: &Asked<'_>) -> bool {
    any.iter().any(|one| one.holds(asked))
}

#[inline(never)]
fn chosen((condition, yes, no): &(Condition, Condition, Condition), asked: &Asked<'_>) -> bool {
    if condition.holds(asked) { yes.holds(asked) } else { no.holds(asked) }
}

#[inline(never)]
fn same(both: &[Condition; 2], asked: &Asked<'_>) -> bool {
    both[0].holds(asked) == both[1].holds(asked)
}

/// The result for a text.
#[inline(never)]
fn read(text: &Text, asked: &Asked<'_>, holds: impl FnOnce(&[u8]) -> bool) -> bool {
    match text.plain(asked) {
        Some(text) => holds(text),
        None => holds(&text.made(asked)),
    }
}

/// The result for two texts.
#[inline(never)]
fn compared(both: &[Text; 2], asked: &Asked<'_>, holds: impl Fn(&[u8], &[u8]) -> bool) -> bool {
    match (both[0].plain(asked), both[1].plain(asked)) {
        (Some(text), Some(other)) => holds(text, other),
        _ => holds(&both[0].of(asked), &both[1].of(asked)),
    }
}

#[inline(never)]
fn one_of(text: &Text, all: &[Text], asked: &Asked<'_>) -> bool {
    let text = text.of(asked);
    all.iter().any(|one| match one.plain(asked) {
        Some(one) => *text == *one,
        None => text == one.made(asked),
    })
}

#[inline(never)]
fn listed_in(text: &Text, split: &Split, asked: &Asked<'_>) -> bool {
    let text = text.of(asked);
    let (of, by) = (split.of.of(asked), split.by.of(asked));
    pieces(&of, &by).any(|piece| *piece == *text)
}

#[inline(never)]
fn among(text: &Text, field: &Field, asked: &Asked<'_>) -> bool {
    let text = text.of(asked);
    field.any(asked, |value| value == text)
}

#[inline(never)]
fn numbers(comparison: Comparison, both: &[Number; 2], asked: &Asked<'_>) -> bool {
    comparison.holds(both[0].compare(&both[1], asked))
}

#[inline(never)]
fn number_one_of(number: &Number, all: &[Number], asked: &Asked<'_>) -> bool {
    all.iter().any(|one| number.compare(one, asked) == Some(Ordering::Equal))
}

#[inline(never)]
fn same_address(both: &[Address; 2], asked: &Asked<'_>) -> bool {
    both[0].of(asked) == both[1].of(asked)
}

#[inline(never)]
fn address_one_of(address: &Address, all: &[Address], asked: &Asked<'_>) -> bool {
    let address = address.of(asked);
    all.iter().any(|one| one.of(asked) == address)
}

#[inline(never)]
fn within(network: &Network, address: &Address, asked: &Asked<'_>) -> bool {
    address.of(asked).is_some_and(|address| network.contains(address))
}

fn matches(text: &[u8], pattern: &Regex) -> bool {
    match std::str::from_utf8(text) {
        Ok(text) => pattern.is_match(text),
        Err(_) => pattern.is_match(&String::from_utf8_lossy(text)),
    }
}

impl Field {
    /// All values of the name, if they can be borrowed from the request.
    fn plain<'a>(&self, asked: &Asked<'a>) -> Option<&'a [u8]> {
        match self {
            Field::Header(name) => single(asked.headers, name),
            Field::ResponseHeader(name) => match asked.response {
                Some(Response { headers: Some(headers), .. }) => single(headers, name),
                _ => Some(&[]),
            },
            Field::Cookie(_) => without_cookies(asked),
            Field::Argument(_) => without_query(asked),
            Field::PeerNames | Field::Claim(_) => None,
        }
    }

    /// The value of the name with this index, from 0; empty if there is none.
    fn nth<'a>(&'a self, asked: &Asked<'a>, number: i64) -> Bytes<'a> {
        let Ok(mut left) = usize::try_from(number) else { return EMPTY };
        let mut found = EMPTY;
        let is_there = self.any(asked, |value| {
            found = value;
            match left.checked_sub(1) {
                Some(less) => {
                    left = less;
                    false
                }
                None => true,
            }
        });
        if is_there { found } else { EMPTY }
    }

    #[inline(never)]
    fn is_there(&self, asked: &Asked<'_>) -> bool {
        match self {
            Field::Header(name) => asked.headers.contains_key(name),
            Field::Cookie(name) => cookies(asked.headers, name).next().is_some(),
            Field::Argument(name) => queried(asked, name).next().is_some(),
            Field::ResponseHeader(name) => {
                asked.response.and_then(|response| response.headers).is_some_and(|headers| headers.contains_key(name))
            }
            Field::PeerNames => !asked.facts.secured.names.is_empty(),
            Field::Claim(name) => !claim(asked, name).is_empty(),
        }
    }

    /// All values of the name as one text; empty if there are none.
    fn of<'a>(&self, asked: &Asked<'a>) -> Bytes<'a> {
        match self {
            Field::Header(name) => header_of(asked.headers, name),
            Field::Cookie(name) => joined(cookies(asked.headers, name).map(Cow::Borrowed)),
            Field::Argument(name) => joined(queried(asked, name)),
            Field::ResponseHeader(name) => match asked.response.and_then(|response| response.headers) {
                Some(headers) => header_of(headers, name),
                None => EMPTY,
            },
            Field::PeerNames => Cow::Borrowed(asked.facts.secured.names.as_bytes()),
            Field::Claim(name) => joined(claim(asked, name).iter().map(|value| Cow::Borrowed(value.as_bytes()))),
        }
    }

    /// Whether this holds for one of the values of the name. Stops at the first one.
    fn any<'a>(&self, asked: &Asked<'a>, mut holds: impl FnMut(Bytes<'a>) -> bool) -> bool {
        match self {
            Field::Header(name) => listed(asked.headers, name).any(|value| holds(Cow::Borrowed(value))),
            Field::Cookie(name) => cookies(asked.headers, name).any(|value| holds(Cow::Borrowed(value))),
            Field::Argument(name) => queried(asked, name).any(holds),
            Field::ResponseHeader(name) => asked
                .response
                .and_then(|response| response.headers)
                .is_some_and(|headers| listed(headers, name).any(|value| holds(Cow::Borrowed(value)))),
            Field::PeerNames => {
                let names = asked.facts.secured.names;
                !names.is_empty() && names.split(',').any(|name| holds(Cow::Borrowed(name.as_bytes())))
            }
            Field::Claim(name) => claim(asked, name).iter().any(|value| holds(Cow::Borrowed(value.as_bytes()))),
        }
    }
}

const EMPTY: Bytes<'static> = Cow::Borrowed(&[]);

/// The value of a header: empty if it is missing, and `None` if there are several.
#[inline(never)]
fn single<'a>(headers: &'a HeaderMap, name: &HeaderName) -> Option<&'a [u8]> {
    let Some(first) = headers.get(name) else { return Some(&[]) };
    // With as many names as values, each name has one.
    let several = headers.len() > headers.keys_len() && headers.get_all(name).iter().nth(1).is_some();
    if several { None } else { Some(first.as_bytes()) }
}

/// Empty if the request has no cookies; else `None`.
#[inline(never)]
fn without_cookies<'a>(asked: &Asked<'a>) -> Option<&'a [u8]> {
    if asked.headers.contains_key(&header::COOKIE) { None } else { Some(&[]) }
}

/// Empty if the target has no query; else `None`.
#[inline(never)]
fn without_query<'a>(asked: &Asked<'a>) -> Option<&'a [u8]> {
    if asked.target.query().is_none_or(str::is_empty) { Some(&[]) } else { None }
}

/// The values of a claim; empty if no filter has accepted a token with it.
fn claim<'a>(asked: &Asked<'a>, name: &[u8]) -> &'a [Box<str>] {
    asked.facts.identity.map_or(&[], |identity| identity.claim(name))
}

/// Several values of one name as one text, as in RFC 9110 §5.3: if a rule read only the first value, a second one
/// could bypass it.
fn joined<'a>(mut values: impl Iterator<Item = Bytes<'a>>) -> Bytes<'a> {
    let Some(first) = values.next() else { return EMPTY };
    let Some(second) = values.next() else { return first };
    let mut all = first.into_owned();
    for value in [second].into_iter().chain(values) {
        all.extend_from_slice(b", ");
        all.extend_from_slice(&value);
    }
    Cow::Owned(all)
}

fn header_of<'a>(headers: &'a HeaderMap, name: &HeaderName) -> Bytes<'a> {
    joined(headers.get_all(name).iter().map(|value| Cow::Borrowed(value.as_bytes())))
}

/// The items of a list header (RFC 9110 §5.6.1): those between commas in each of its lines, without empty ones.
fn listed<'a>(headers: &'a HeaderMap, name: &HeaderName) -> impl Iterator<Item = &'a [u8]> {
    let items = headers.get_all(name).iter().flat_map(|line| line.as_bytes().split(|&byte| byte == b','));
    items.map(<[u8]>::trim_ascii).filter(|item| !item.is_empty())
}

/// The values of the arguments of this name, decoded.
fn queried<'a>(asked: &Asked<'a>, name: &[u8]) -> impl Iterator<Item = Bytes<'a>> {
    arguments(asked.target.query().unwrap_or_default(), name).map(|value| {
        let encoded = value.bytes().any(|byte| matches!(byte, b'%' | b'+'));
        if encoded { Cow::Owned(decoded(value).collect()) } else { Cow::Borrowed(value.as_bytes()) }
    })
}

const REQUEST_ID: HeaderName = HeaderName::from_static("x-request-id");

impl Text {
    /// Evaluates to text.
    pub fn of<'a>(&'a self, asked: &Asked<'a>) -> Bytes<'a> {
        self.plain(asked).map_or_else(|| self.made(asked), Cow::Borrowed)
    }

    /// The text, if it can be borrowed from the request or the expression, which costs almost nothing. The calls are in
    /// tail position, as in [`Condition::holds`].
    #[inline(never)]
    fn plain<'a>(&'a self, asked: &Asked<'a>) -> Option<&'a [u8]> {
        match self {
            Text::Literal(text) => Some(text),
            Text::Method => Some(asked.method.as_str().as_bytes()),
            Text::Path => Some(asked.facts.path.as_bytes()),
            Text::Query => query(asked),
            Text::Host => plain_host(asked),
            Text::Scheme => Some(asked.facts.scheme.as_bytes()),
            Text::Route => Some(asked.facts.route.as_bytes()),
            Text::Listener => Some(asked.facts.listener.as_bytes()),
            Text::Field(field) => field.plain(asked),
            Text::OrValue(both) => plain_or_value(both, asked),
            _ => None,
        }
    }

    fn effort(&self) -> Effort {
        match self {
            Text::Literal(_)
            | Text::Method
            | Text::Path
            | Text::Target
            | Text::Query
            | Text::Scheme
            | Text::Version
            | Text::Route
            | Text::TlsVersion
            | Text::Listener
            | Text::Sni
            | Text::PeerSubject
            | Text::PeerFingerprint => Effort::Read,
            Text::Host | Text::Id | Text::Field(_) => Effort::Look,
            Text::OrValue(both) => both[0].effort().max(both[1].effort()),
            _ => Effort::Compute,
        }
    }

    #[inline(never)]
    fn made<'a>(&'a self, asked: &Asked<'a>) -> Bytes<'a> {
        match self {
            // These are borrowed.
            Text::Literal(_)
            | Text::Method
            | Text::Path
            | Text::Query
            | Text::Scheme
            | Text::Route
            | Text::Listener => self.plain(asked).map_or(EMPTY, Cow::Borrowed),
            Text::Target => {
                let target = asked.target.path_and_query().map_or(asked.target.path(), |target| target.as_str());
                Cow::Borrowed(target.as_bytes())
            }
            Text::Host => cased(Cow::Borrowed(host(asked)), u8::is_ascii_uppercase, <[u8]>::make_ascii_lowercase),
            Text::Version => Cow::Borrowed(version(asked.version).as_bytes()),
            Text::Id => header_of(asked.headers, &REQUEST_ID),
            Text::TlsVersion => Cow::Borrowed(asked.facts.secured.version.as_bytes()),
            Text::Sni => Cow::Borrowed(asked.facts.secured.sni.as_bytes()),
            Text::PeerSubject => Cow::Borrowed(asked.facts.secured.subject.as_bytes()),
            Text::PeerFingerprint => Cow::Borrowed(asked.facts.secured.fingerprint.as_bytes()),
            Text::Network => {
                asked.facts.client.map_or(EMPTY, |client| Cow::Owned(asked.facts.prefix.network(client).into_bytes()))
            }
            Text::User => asked.facts.identity.map_or(EMPTY, |identity| Cow::Borrowed(identity.user.as_bytes())),
            Text::Reason => asked.facts.refusal().map_or(EMPTY, |refusal| Cow::Borrowed(refusal.reason.as_bytes())),
            Text::Message => asked.facts.refusal().map_or(EMPTY, |refusal| Cow::Borrowed(refusal.message.as_bytes())),
            Text::Authenticator => asked.facts.identity.map_or(EMPTY, |identity| Cow::Borrowed(identity.by.as_bytes())),
            Text::Field(field) => field.of(asked),
            Text::Value(value) => value.0.nth(asked, value.1.of(asked)),
            Text::Lower(text) => cased(text.of(asked), u8::is_ascii_uppercase, <[u8]>::make_ascii_lowercase),
            Text::Upper(text) => cased(text.of(asked), u8::is_ascii_lowercase, <[u8]>::make_ascii_uppercase),
            Text::Trim(text) => match text.of(asked) {
                Cow::Borrowed(text) => Cow::Borrowed(text.trim_ascii()),
                Cow::Owned(text) => Cow::Owned(text.trim_ascii().to_vec()),
            },
            Text::Join(parts) => {
                let mut joined = Vec::new();
                parts.iter().for_each(|part| joined.extend_from_slice(&part.of(asked)));
                Cow::Owned(joined)
            }
            Text::Replace(parts) => replaced(parts[0].of(asked), &parts[1].of(asked), &parts[2].of(asked)),
            Text::Substring(parts) => {
                let (text, from, to) = &**parts;
                let (text, from) = (text.of(asked), from.of(asked));
                let to = to.as_ref().map(|to| to.of(asked));
                substring(text, from, to)
            }
            Text::Item(both) => {
                let (split, number) = &**both;
                item(split.of.of(asked), &split.by.of(asked), number.of(asked))
            }
            Text::OrValue(both) => {
                let text = both[0].of(asked);
                if text.is_empty() { both[1].of(asked) } else { text }
            }
            Text::Encode(text) => Cow::Owned(STANDARD.encode(text.of(asked)).into_bytes()),
            Text::Decode(text) => Cow::Owned(LENIENT.decode(&*text.of(asked)).unwrap_or_default()),
            Text::OfInt(int) => Cow::Owned(int.of(asked).to_string().into_bytes()),
            Text::OfDouble(double) => Cow::Owned(double.of(asked).to_string().into_bytes()),
            Text::OfCondition(condition) => {
                Cow::Borrowed(if condition.holds(asked) { b"true".as_slice() } else { b"false" })
            }
            Text::OfAddress(address) => match address.of(asked) {
                Some(address) => Cow::Owned(address.to_string().into_bytes()),
                None => EMPTY,
            },
            Text::Choice(choice) => {
                let (condition, yes, no) = &**choice;
                if condition.holds(asked) { yes.of(asked) } else { no.of(asked) }
            }
        }
    }
}

/// The piece of a text with this index, from 0; empty if there are fewer.
fn item<'a>(of: Bytes<'a>, by: &[u8], number: i64) -> Bytes<'a> {
    let Ok(number) = usize::try_from(number) else { return EMPTY };
    match of {
        Cow::Borrowed(of) => Cow::Borrowed(pieces(of, by).nth(number).unwrap_or_default()),
        Cow::Owned(of) => Cow::Owned(pieces(&of, by).nth(number).unwrap_or_default().to_vec()),
    }
}

/// Padding is optional, as in tokens of browsers and of mail.
const LENIENT: GeneralPurpose = GeneralPurpose::new(
    &base64::alphabet::STANDARD,
    GeneralPurposeConfig::new().with_decode_padding_mode(DecodePaddingMode::Indifferent),
);

fn version(version: Version) -> &'static str {
    match version {
        Version::HTTP_10 => "1.0",
        Version::HTTP_2 => "2",
        Version::HTTP_3 => "3",
        _ => "1.1",
    }
}

#[inline(never)]
fn query<'a>(asked: &Asked<'a>) -> Option<&'a [u8]> {
    Some(asked.target.query().unwrap_or_default().as_bytes())
}

/// The host as in route matching: without its port and a final dot, but in the case in which it was written.
fn host<'a>(asked: &Asked<'a>) -> &'a [u8] {
    let written = asked.headers.get(&header::HOST).map_or(&[][..], |host| host.as_bytes());
    let port = written.iter().rposition(|&byte| byte == b':').filter(|_| !written.ends_with(b"]"));
    let name = &written[..port.unwrap_or(written.len())];
    name.strip_suffix(b".").unwrap_or(name)
}

/// The host, if it was written in lower case.
#[inline(never)]
fn plain_host<'a>(asked: &Asked<'a>) -> Option<&'a [u8]> {
    let host = host(asked);
    if host.iter().any(u8::is_ascii_uppercase) { None } else { Some(host) }
}

/// The first of two texts that is not empty, if both can be borrowed. Those in a row are made: trying each of them
/// first would take quadratic time.
#[inline(never)]
fn plain_or_value<'a>(both: &'a [Text; 2], asked: &Asked<'a>) -> Option<&'a [u8]> {
    if both.iter().any(|text| matches!(text, Text::OrValue(_))) {
        return None;
    }
    let text = both[0].plain(asked)?;
    if text.is_empty() { both[1].plain(asked) } else { Some(text) }
}

/// Changes the case of a text, if it has letters of the other case.
fn cased(text: Bytes<'_>, other: fn(&u8) -> bool, change: fn(&mut [u8])) -> Bytes<'_> {
    if !text.iter().any(other) {
        return text;
    }
    let mut text = text.into_owned();
    change(&mut text);
    Cow::Owned(text)
}

/// Replaces each `old` by `new`. The result is truncated at [`REPLACED_BYTES_MAX`]. An empty `old` matches nothing.
fn replaced<'a>(text: Bytes<'a>, old: &[u8], new: &[u8]) -> Bytes<'a> {
    if old.is_empty() {
        return text;
    }
    let finder = Finder::new(old);
    let Some(mut at) = finder.find(&text) else { return text };
    let most = text.len().max(REPLACED_BYTES_MAX);
    let mut done = Vec::with_capacity(text.len());
    let mut rest = &*text;
    loop {
        done.extend_from_slice(&rest[..at]);
        done.extend_from_slice(new);
        rest = &rest[at + old.len()..];
        match finder.find(rest) {
            Some(next) if done.len() < most => at = next,
            _ => {
                done.extend_from_slice(rest);
                done.truncate(most);
                return Cow::Owned(done);
            }
        }
    }
}

/// The characters from one index to before another. Indexes outside the text are clamped.
fn substring(text: Bytes<'_>, from: i64, to: Option<i64>) -> Bytes<'_> {
    let at = |number: i64| {
        let number = usize::try_from(number).unwrap_or(0);
        characters(&text).nth(number).map_or(text.len(), |(at, _)| at)
    };
    let (from, to) = (at(from), to.map_or(text.len(), at));
    let part = from.min(to)..to;
    match text {
        Cow::Borrowed(text) => Cow::Borrowed(&text[part]),
        Cow::Owned(text) => Cow::Owned(text[part].to_vec()),
    }
}

/// The characters of a text with their places and lengths in bytes. An invalid byte counts as one character.
fn characters(text: &[u8]) -> impl Iterator<Item = (usize, usize)> + '_ {
    let mut start = 0;
    text.utf8_chunks().flat_map(move |chunk| {
        let (valid, from) = (chunk.valid(), start);
        let bad = from + valid.len();
        start = bad + chunk.invalid().len();
        let good = valid.char_indices().map(move |(at, c)| (from + at, c.len_utf8()));
        good.chain((bad..start).map(|at| (at, 1)))
    })
}

/// The text between separators; each character, if the separator is empty.
fn pieces<'t>(text: &'t [u8], by: &[u8]) -> impl Iterator<Item = &'t [u8]> {
    let finder = (!by.is_empty()).then(|| Finder::new(by).into_owned());
    let mut letters = by.is_empty().then(|| characters(text));
    let (mut rest, length) = (Some(text), by.len());
    std::iter::from_fn(move || {
        if let Some(letters) = &mut letters {
            return letters.next().map(|(at, length)| &text[at..at + length]);
        }
        let now = rest?;
        let (piece, after) = match finder.as_ref().and_then(|finder| finder.find(now)) {
            Some(at) => (&now[..at], Some(&now[at + length..])),
            None => (now, None),
        };
        rest = after;
        Some(piece)
    })
}

impl Int {
    /// Evaluates to an integer. A result outside 64 bits is clamped, and a division by zero gives zero.
    pub fn of(&self, asked: &Asked<'_>) -> i64 {
        let both = |both: &[Int; 2]| (both[0].of(asked), both[1].of(asked));
        match self {
            Int::Literal(number) => *number,
            Int::Time => {
                let since = asked.facts.began_at().duration_since(UNIX_EPOCH).unwrap_or_default();
                i64::try_from(since.as_secs()).unwrap_or(i64::MAX)
            }
            Int::Size => announced(asked),
            Int::Port => asked.facts.port.into(),
            Int::Code => asked.response.map_or(0, |response| response.code.into()),
            Int::Length(text) => length(&text.of(asked)),
            Int::Items(split) => {
                let (of, by) = (split.of.of(asked), split.by.of(asked));
                count(pieces(&of, &by).count())
            }
            Int::Values(field) => {
                let mut values = 0;
                field.any(asked, |_| {
                    values += 1;
                    false
                });
                values
            }
            Int::Parse(text) => std::str::from_utf8(&text.of(asked)).ok().and_then(|it| it.parse().ok()).unwrap_or(0),
            // A number that is too large becomes the largest one, and an invalid one becomes 0.
            Int::OfDouble(double) => double.of(asked) as i64,
            Int::Hash(text) => positive(xxh3_64(&text.of(asked))),
            Int::HashAddress(address) => match address.of(asked) {
                Some(IpAddr::V4(address)) => positive(xxh3_64(&address.octets())),
                Some(IpAddr::V6(address)) => positive(xxh3_64(&address.octets())),
                None => positive(xxh3_64(&[])),
            },
            Int::Negate(number) => number.of(asked).saturating_neg(),
            Int::Add(numbers) => {
                let (a, b) = both(numbers);
                a.saturating_add(b)
            }
            Int::Subtract(numbers) => {
                let (a, b) = both(numbers);
                a.saturating_sub(b)
            }
            Int::Multiply(numbers) => {
                let (a, b) = both(numbers);
                a.saturating_mul(b)
            }
            Int::Divide(numbers) => match both(numbers) {
                (_, 0) => 0,
                (a, b) => a.saturating_div(b),
            },
            Int::Remainder(numbers) => match both(numbers) {
                (_, 0) => 0,
                (a, b) => a.wrapping_rem(b),
            },
            Int::Choice(choice) => {
                let (condition, yes, no) = &**choice;
                if condition.holds(asked) { yes.of(asked) } else { no.of(asked) }
            }
        }
    }
}

/// The announced length of the request body; 0 without a body. An unknown length counts as the largest, since
/// otherwise a client could bypass a limit by not announcing the length.
fn announced(asked: &Asked<'_>) -> i64 {
    match asked.headers.get(header::CONTENT_LENGTH) {
        Some(length) => length.to_str().ok().and_then(|length| length.parse().ok()).unwrap_or(i64::MAX),
        None if asked.facts.ended => 0,
        // HTTP/2 delimits bodies by frames, and needs no header for them.
        None if asked.version == Version::HTTP_2 || asked.headers.contains_key(header::TRANSFER_ENCODING) => i64::MAX,
        None => 0,
    }
}

fn length(text: &[u8]) -> i64 {
    count(if text.is_ascii() { text.len() } else { characters(text).count() })
}

fn count(number: usize) -> i64 {
    i64::try_from(number).unwrap_or(i64::MAX)
}

/// `%` never gives a negative number.
fn positive(hash: u64) -> i64 {
    (hash >> 1).cast_signed()
}

impl Double {
    /// Evaluates to a double, which may be infinite or NaN (IEEE 754).
    pub fn of(&self, asked: &Asked<'_>) -> f64 {
        let both = |both: &[Double; 2]| (both[0].of(asked), both[1].of(asked));
        match self {
            Double::Literal(number) => *number,
            Double::PhaseAge => asked.phase_age(),
            Double::Rate => asked.rate(),
            Double::Parse(text) => {
                std::str::from_utf8(&text.of(asked)).ok().and_then(|it| it.parse().ok()).unwrap_or(0.0)
            }
            Double::OfInt(int) => int.of(asked) as f64,
            Double::Negate(number) => -number.of(asked),
            Double::Add(numbers) => {
                let (a, b) = both(numbers);
                a + b
            }
            Double::Subtract(numbers) => {
                let (a, b) = both(numbers);
                a - b
            }
            Double::Multiply(numbers) => {
                let (a, b) = both(numbers);
                a * b
            }
            Double::Divide(numbers) => {
                let (a, b) = both(numbers);
                a / b
            }
            Double::Choice(choice) => {
                let (condition, yes, no) = &**choice;
                if condition.holds(asked) { yes.of(asked) } else { no.of(asked) }
            }
        }
    }
}

impl Number {
    fn compare(&self, other: &Number, asked: &Asked<'_>) -> Option<Ordering> {
        match (self, other) {
            (Number::Int(a), Number::Int(b)) => Some(a.of(asked).cmp(&b.of(asked))),
            (a, b) => a.double(asked).partial_cmp(&b.double(asked)),
        }
    }

    fn double(&self, asked: &Asked<'_>) -> f64 {
        match self {
            Number::Int(int) => int.of(asked) as f64,
            Number::Double(double) => double.of(asked),
        }
    }
}

impl Address {
    /// Evaluates to an address. An IPv4 address in IPv6 form becomes IPv4.
    fn of(&self, asked: &Asked<'_>) -> Option<IpAddr> {
        match self {
            Address::Client => match asked.facts.client {
                Some(IpAddr::V6(client)) => Some(client.to_canonical()),
                client => client,
            },
            Address::Literal(address) => Some(*address),
            Address::Parse(text) => parsed_address(&text.of(asked)),
        }
    }
}

/// Parses an address such as `192.0.2.1`.
pub(super) fn parsed_address(text: &[u8]) -> Option<IpAddr> {
    std::str::from_utf8(text).ok()?.parse::<IpAddr>().ok().map(|address| address.to_canonical())
}
