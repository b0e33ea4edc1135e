//! Named texts: additional fields of the access log, and attributes of spans.

use std::borrow::Cow;

use super::{Asked, Value};

/// Names with their texts, sorted by name.
#[derive(Clone, Debug, Default)]
pub struct Named(Box<[(Box<str>, Words)]>);

/// A name with its text in one exchange.
pub type NamedText<'a> = (&'a str, Cow<'a, [u8]>);

/// A text, fixed or computed for each exchange.
#[derive(Clone, Debug)]
pub enum Words {
    /// Fixed.
    Fixed(Box<str>),
    /// The result of an expression.
    Made(Value),
}

impl FromIterator<(Box<str>, Words)> for Named {
    fn from_iter<I: IntoIterator<Item = (Box<str>, Words)>>(named: I) -> Self {
        Named(named.into_iter().collect())
    }
}

impl Named {
    /// Whether there are no names.
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// The texts of this exchange, without empty ones. Allocates nothing if there are no names.
    pub fn of<'a>(&'a self, asked: &Asked<'a>) -> Box<[NamedText<'a>]> {
        let text = |(name, words): &'a (Box<str>, Words)| {
            let text = match words {
                Words::Fixed(text) => Cow::Borrowed(text.as_bytes()),
                Words::Made(made) => made.of(asked),
            };
            (!text.is_empty()).then_some((&**name, text))
        };
        self.0.iter().filter_map(text).collect()
    }
}
