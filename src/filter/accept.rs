//! Content negotiation: the response format that a client prefers by its `Accept` (RFC 9110 §12.5.1).

use http::HeaderMap;
use http::header::ACCEPT;

/// How well a format fits `Accept`: its weight in thousandths, and how specific the matching range is.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord)]
struct Fit {
    weight: u16,
    closeness: u8,
}

/// The index of the format that the client prefers; the first of several equals. Each format is a list of media types:
/// the first is its own, and it also serves clients that accept one of the others. `None`: the client accepts none.
pub(super) fn best(headers: &HeaderMap, forms: &[&[&str]]) -> Option<usize> {
    if !headers.contains_key(ACCEPT) {
        return (!forms.is_empty()).then_some(0);
    }
    let mut best: Option<(usize, Fit)> = None;
    for (place, kinds) in forms.iter().enumerate() {
        let own = |(index, kind): (usize, &&str)| {
            let fit = fit(headers, kind);
            // A type in `Accept` counts more if it is the format's own.
            Fit { closeness: if index == 0 { fit.closeness } else { fit.closeness.saturating_sub(1) }, ..fit }
        };
        let fit = kinds.iter().enumerate().map(own).max().unwrap_or_default();
        if fit.weight > 0 && best.is_none_or(|(_, other)| fit > other) {
            best = Some((place, fit));
        }
    }
    best.map(|(place, _)| place)
}

/// The most specific matching range determines the weight.
fn fit(headers: &HeaderMap, kind: &str) -> Fit {
    let family = kind.split('/').next().unwrap_or_default();
    let mut found = Fit::default();
    for line in headers.get_all(ACCEPT).iter().filter_map(|line| line.to_str().ok()) {
        for range in line.split(',') {
            let mut parts = range.split(';').map(str::trim);
            let name = parts.next().unwrap_or_default();
            let closeness = match name.split_once('/') {
                Some(("*", "*")) => 1,
                Some((first, "*")) if first.eq_ignore_ascii_case(family) => 2,
                Some(_) if name.eq_ignore_ascii_case(kind) => 4,
                _ => continue,
            };
            if closeness > found.closeness {
                found = Fit { weight: weight(parts), closeness };
            }
        }
    }
    found
}

/// The weight in the parameters of a range, in thousandths. An invalid number counts as 0.
fn weight<'p>(mut parameters: impl Iterator<Item = &'p str>) -> u16 {
    let written = parameters.find_map(|part| part.strip_prefix("q=").or_else(|| part.strip_prefix("Q=")));
    let weight = written.map_or(1.0, |weight| weight.parse::<f32>().unwrap_or_default());
    (weight.clamp(0.0, 1.0) * 1000.0).round() as u16
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_client_says_which_form_it_likes_best() {
        const HTML: &[&str] = &["text/html", "application/xhtml+xml"];
        const PROBLEM: &[&str] = &["application/problem+json", "application/json"];
        const JSON: &[&str] = &["application/json", "application/problem+json"];
        let best = |accept: &[&str], forms: &[&[&'static str]]| {
            let mut headers = HeaderMap::new();
            accept.iter().for_each(|line| _ = headers.append(ACCEPT, line.parse().unwrap()));
            super::best(&headers, forms).map(|place| forms[place][0])
        };
        let all = [HTML, PROBLEM, JSON, &["text/plain"]];
        for (accept, kind) in [
            ("text/html,application/xhtml+xml,application/xml;q=0.9,*/*;q=0.8", Some("text/html")),
            ("*/*", Some("text/html")),
            ("application/json, text/plain, */*", Some("application/json")),
            ("application/problem+json", Some("application/problem+json")),
            ("application/json", Some("application/json")),
            ("APPLICATION/JSON;q=0.5, text/html;Q=0.4", Some("application/json")),
            ("application/*", Some("application/problem+json")),
            ("text/*;q=0.5, text/html;q=0", Some("text/plain")),
            ("*/*, text/html;q=0.1, application/*;q=0.2", Some("text/plain")),
            ("text/html;q=junk, image/png", None),
            ("text/html;q=0", None),
            ("image/*", None),
            ("", None),
        ] {
            assert_eq!(best(&[accept], &all), kind, "{accept}");
        }
        assert_eq!(best(&[], &all), Some("text/html"));
        assert_eq!(best(&["image/png", "text/plain"], &all), Some("text/plain"));
        assert_eq!(best(&["application/json"], &[HTML, PROBLEM]), Some("application/problem+json"));
        assert_eq!(best(&["application/problem+json"], &[HTML, JSON]), Some("application/json"));
        assert_eq!(best(&["application/json, */*"], &[HTML, PROBLEM]), Some("application/problem+json"));
        assert_eq!(best(&[], &[]), None);
    }
}
