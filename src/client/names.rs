//! A map from host names to values: exact names, and wildcards for one label.

use std::collections::HashMap;

/// Values by name. Names are in lower case; a wildcard begins with `*.`.
#[derive(Clone)]
pub struct Names<T> {
    exact: HashMap<Box<str>, T>,
    /// By the part after the `*.`.
    wildcards: HashMap<Box<str>, T>,
}

impl<T> Names<T> {
    /// Sets the value of a name; returns the previous one.
    pub fn insert(&mut self, name: &str, value: T) -> Option<T> {
        match name.strip_prefix("*.") {
            Some(rest) => self.wildcards.insert(rest.into(), value),
            None => self.exact.insert(name.into(), value),
        }
    }

    /// The value for this name, which is in lower case: an exact name takes precedence over a wildcard.
    pub fn find(&self, name: &str) -> Option<&T> {
        let name = name.strip_suffix('.').unwrap_or(name);
        // A wildcard covers exactly one label (RFC 6125 §6.4.3).
        let wildcard = || name.split_once('.').and_then(|(_, rest)| self.wildcards.get(rest));
        self.exact.get(name).or_else(wildcard)
    }

    /// Whether there are no names.
    pub fn is_empty(&self) -> bool {
        self.exact.is_empty() && self.wildcards.is_empty()
    }
}

impl<T> Default for Names<T> {
    fn default() -> Self {
        Names { exact: HashMap::new(), wildcards: HashMap::new() }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_wildcard_stands_for_one_label_and_comes_after_an_exact_name() {
        let mut names = Names::default();
        for (number, name) in ["a.test", "*.a.test", "b.a.test"].into_iter().enumerate() {
            assert_eq!(names.insert(name, number), None);
        }
        let found = |name: &str| names.find(name).copied();
        assert_eq!([found("a.test"), found("a.test."), found("b.a.test")], [Some(0), Some(0), Some(2)]);
        assert_eq!([found("x.a.test"), found("y.x.a.test"), found("test"), found("")], [Some(1), None, None, None]);
        assert_eq!(names.insert("*.a.test", 9), Some(1));
    }
}
