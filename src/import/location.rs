//! Translates nginx's order of locations into routes.
//!
//! nginx prefers an exact location. Otherwise it finds the longest prefix; if that is marked `^~`, it is used.
//! Otherwise the first matching regular expression in file order is used, and if none matches, the longest prefix.
//!
//! Routes have another order: exact, then the longest prefix by whole segments, then regular expressions (those
//! with a condition first, otherwise in file order), then the prefix `/`. If a server has only prefixes that end
//! with a slash, they stay prefixes. Otherwise all become regular expressions, in an order that sends each request
//! to the same location as nginx.

use super::text;

/// The path condition of a location.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Asks {
    /// `=`
    Exact(String),
    /// No modifier.
    Prefix(String),
    /// `^~`
    Firm(String),
    /// `~`, or `~*` if `any_case`. One inside another location belongs to that location's prefix.
    Regex { pattern: String, any_case: bool, within: Option<String> },
}

/// The path condition of a route.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Path {
    /// Every path.
    Any,
    /// `exact`
    Exact(String),
    /// `prefix`
    Prefix(String),
    /// `regex`
    Regex(String),
}

/// A route for a location.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Placed {
    /// The index of the location.
    pub location: usize,
    /// Its path condition.
    pub path: Path,
    /// Path prefixes that belong to other locations.
    pub except: Vec<String>,
    /// A required path prefix.
    pub within: Option<String>,
}

impl Asks {
    /// The prefix, if it is a prefix location.
    pub fn prefix(&self) -> Option<&str> {
        match self {
            Asks::Prefix(prefix) | Asks::Firm(prefix) => Some(prefix),
            _ => None,
        }
    }
}

/// The routes of these locations in order, and locations without an equivalent, with the reason.
pub fn routes(locations: &[Asks]) -> (Vec<Placed>, Vec<(usize, String)>) {
    let simple = |asks: &Asks| match asks {
        Asks::Exact(_) => true,
        Asks::Prefix(prefix) | Asks::Firm(prefix) => prefix.ends_with('/'),
        Asks::Regex { .. } => false,
    };
    let by_segments = locations.iter().all(simple);
    let placed = |location, path| Placed { location, path, except: Vec::new(), within: None };
    let (mut routes, mut lost) = (Vec::new(), Vec::new());
    for (number, asks) in locations.iter().enumerate() {
        if let Asks::Exact(path) = asks {
            routes.push(placed(number, Path::Exact(path.clone())));
        }
    }
    let mut prefixes: Vec<(usize, &str, bool)> = locations
        .iter()
        .enumerate()
        .filter_map(|(number, asks)| Some((number, asks.prefix()?, matches!(asks, Asks::Firm(_)))))
        .collect();
    prefixes.sort_by_key(|(_, prefix, _)| std::cmp::Reverse(prefix.len()));
    if by_segments {
        for (number, prefix, _) in prefixes {
            let path = if prefix == "/" { Path::Any } else { Path::Prefix(prefix.trim_end_matches('/').to_owned()) };
            routes.push(placed(number, path));
        }
        return (routes, lost);
    }
    let any = |prefix: &str| Path::Regex(format!("{}.*", regex::escape(prefix)));
    for &(number, prefix, firm) in &prefixes {
        if firm {
            // A longer prefix without a modifier takes its paths back, and lets regular expressions apply.
            let longer =
                prefixes.iter().filter(|(_, other, _)| other.len() > prefix.len() && other.starts_with(prefix));
            let except: Vec<String> = longer.map(|(_, other, _)| (*other).to_owned()).collect();
            let nested = prefixes
                .iter()
                .any(|(_, other, firm)| !firm && other.len() > prefix.len() && other.starts_with(prefix));
            routes.push(Placed { except: if nested { except } else { Vec::new() }, ..placed(number, any(prefix)) });
        }
    }
    // Nested expressions are tried before the others if the prefix of their location is the longest.
    let mut expressions: Vec<_> = locations.iter().enumerate().collect();
    expressions.sort_by_key(|(_, asks)| !matches!(asks, Asks::Regex { within: Some(_), .. }));
    for (number, asks) in expressions {
        if let Asks::Regex { pattern, any_case, within } = asks {
            match text::whole(pattern, *any_case) {
                Ok(pattern) => {
                    let except = within.iter().flat_map(|within| {
                        let longer = |other: &&str| other.len() > within.len() && other.starts_with(within.as_str());
                        prefixes
                            .iter()
                            .map(|(_, other, _)| *other)
                            .filter(longer)
                            .map(str::to_owned)
                            .collect::<Vec<_>>()
                    });
                    let except = except.collect();
                    routes.push(Placed { within: within.clone(), except, ..placed(number, Path::Regex(pattern)) });
                }
                Err(why) => lost.push((number, why)),
            }
        }
    }
    for &(number, prefix, firm) in &prefixes {
        if !firm {
            routes.push(placed(number, if prefix == "/" { Path::Any } else { any(prefix) }));
        }
    }
    (routes, lost)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use regex::Regex;

    use super::*;

    /// The location that nginx chooses, according to its documentation.
    fn nginx(locations: &[Asks], path: &str) -> Option<usize> {
        let all = || locations.iter().enumerate();
        if let Some((exact, _)) = all().find(|(_, asks)| **asks == Asks::Exact(path.to_owned())) {
            return Some(exact);
        }
        let prefixes =
            all().filter_map(|(number, asks)| Some((number, asks.prefix().filter(|it| path.starts_with(it))?)));
        let longest = prefixes.max_by_key(|(_, prefix)| prefix.len());
        if let Some((number, _)) = longest
            && matches!(locations[number], Asks::Firm(_))
        {
            return Some(number);
        }
        let matches = |pattern: &str, any_case: bool| {
            Regex::new(&format!("{}{pattern}", if any_case { "(?i)" } else { "" })).expect("a pattern").is_match(path)
        };
        let nested = longest.and_then(|(_, prefix)| {
            all().find(|(_, asks)| match asks {
                Asks::Regex { pattern, any_case, within: Some(within) } => {
                    within == prefix && matches(pattern, *any_case)
                }
                _ => false,
            })
        });
        let first = || {
            all().find(|(_, asks)| match asks {
                Asks::Regex { pattern, any_case, within: None } => matches(pattern, *any_case),
                _ => false,
            })
        };
        nested.or_else(first).map(|(number, _)| number).or(longest.map(|(number, _)| number))
    }

    /// The location that the routes choose, in Forebay's order.
    fn forebay(locations: &[Asks], path: &str) -> Option<usize> {
        let (routes, lost) = routes(locations);
        assert!(lost.is_empty(), "{lost:?}");
        let whole = |pattern: &str| Regex::new(&format!(r"\A(?:{pattern})\z")).expect("a pattern").is_match(path);
        let takes = |route: &&Placed| {
            route.within.as_ref().is_none_or(|within| path.starts_with(within.as_str()))
                && !route.except.iter().any(|other| path.starts_with(other.as_str()))
        };
        let conditional = |route: &&Placed| route.within.is_some() || !route.except.is_empty();
        let exact = routes.iter().find(|route| route.path == Path::Exact(path.to_owned()));
        let below =
            |prefix: &str| path.strip_prefix(prefix).is_some_and(|rest| rest.is_empty() || rest.starts_with('/'));
        let prefix = || {
            let prefixes = routes.iter().filter_map(|route| match &route.path {
                Path::Prefix(prefix) if below(prefix) => Some((prefix.len(), route)),
                _ => None,
            });
            prefixes.max_by_key(|(length, _)| *length).map(|(_, route)| route)
        };
        let regex = |with: bool| {
            let expressions = routes.iter().filter(move |route| conditional(route) == with);
            expressions.filter(takes).find(|route| matches!(&route.path, Path::Regex(pattern) if whole(pattern)))
        };
        let any = || routes.iter().find(|route| route.path == Path::Any);
        let found = exact.or_else(prefix).or_else(|| regex(true)).or_else(|| regex(false)).or_else(any);
        found.map(|route| route.location)
    }

    fn prefix(prefix: &str) -> Asks {
        Asks::Prefix(prefix.to_owned())
    }

    fn regex(pattern: &str, any_case: bool, within: Option<&str>) -> Asks {
        Asks::Regex { pattern: pattern.to_owned(), any_case, within: within.map(str::to_owned) }
    }

    #[test]
    fn prefixes_that_end_with_a_slash_stay_prefixes() {
        let (routes, _) = routes(&[prefix("/"), prefix("/api/"), Asks::Exact("/x".into())]);
        let paths: Vec<_> = routes.into_iter().map(|route| route.path).collect();
        assert_eq!(paths, [Path::Exact("/x".into()), Path::Prefix("/api".into()), Path::Any]);
    }

    #[test]
    fn every_path_goes_where_nginx_would_send_it() {
        let locations = [
            prefix("/"),
            prefix("/documents/"),
            Asks::Firm("/images/".into()),
            regex(r"\.(gif|jpg|jpeg)$", true, None),
            Asks::Exact("/".into()),
            prefix("/images/raw/"),
            prefix("/api"),
            regex(r"^/documents/secret", false, Some("/documents/")),
            regex("secret", false, None),
        ];
        for (path, expected) in [
            ("/", 4),
            ("/index.html", 0),
            ("/documents/document.html", 1),
            ("/images/1.gif", 2),
            ("/documents/1.jpg", 3),
            ("/images/raw/1.GIF", 3),
            ("/images/raw/a", 5),
            ("/apis", 6),
            ("/api/a.jpg", 3),
            ("/documents/secret.jpg", 7),
            ("/x/secret", 8),
            ("/images/secret", 2),
        ] {
            assert_eq!((path, nginx(&locations, path)), (path, Some(expected)));
            assert_eq!((path, forebay(&locations, path)), (path, Some(expected)));
        }
    }

    fn asks() -> impl Strategy<Value = Asks> {
        let path = || "(/|/a|/a/|/a/b|/a/b/|/ab|/b/|/a/b/c/)";
        prop_oneof![
            path().prop_map(Asks::Exact),
            path().prop_map(Asks::Prefix),
            path().prop_map(Asks::Prefix),
            path().prop_map(Asks::Firm),
            (prop::sample::select(vec!["^/a", "b$", "c", "/b", "^/a/b/", "^/b", "b/c", "^/a$|c$"]), any::<bool>())
                .prop_map(|(pattern, any_case)| Asks::Regex { pattern: pattern.to_owned(), any_case, within: None }),
        ]
    }

    proptest! {
        #![proptest_config(ProptestConfig { cases: 500, failure_persistence: None, ..Default::default() })]

        #[test]
        fn no_set_of_locations_is_told_apart(
            mut locations in prop::collection::vec(asks(), 0..8),
            path in "(/[abc]{0,2}){1,4}",
        ) {
            // nginx rejects duplicates.
            let mut seen = Vec::new();
            locations.retain(|asks| {
                let key = asks.prefix().map_or_else(|| format!("{asks:?}"), str::to_owned);
                let new = !seen.contains(&key);
                seen.push(key);
                new
            });
            let found = forebay(&locations, &path);
            let expected = nginx(&locations, &path);
            // A location `/a/` also gets a separate route for `/a` during translation.
            let slash = format!("{path}/");
            let redirected = locations.iter().any(|asks| asks.prefix() == Some(&slash));
            prop_assert!(found == expected || redirected, "{locations:?} {path}: {found:?}, and nginx {expected:?}");
        }
    }
}
