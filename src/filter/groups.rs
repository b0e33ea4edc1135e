//! The replacement for a match: text and groups of the pattern (`$1`, `${name}`, `$$`).

/// A part of a replacement.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Piece {
    Text(String),
    /// The text that this group of the pattern matched; empty if it did not take part in the match.
    Group(usize),
}

/// Splits `to` into text and groups, with the grammar of `Regex::replace`, except that groups must exist. `names` are
/// the names of the pattern's groups, where the first is the whole match.
///
/// # Errors
/// The mistake.
pub(super) fn pieces(to: &str, names: &[Option<&str>]) -> Result<Vec<Piece>, String> {
    let mut pieces = Vec::new();
    let mut rest = to;
    while let Some((text, after)) = rest.split_once('$') {
        pieces.push(Piece::Text(text.to_owned()));
        if let Some(after) = after.strip_prefix('$') {
            pieces.push(Piece::Text("$".to_owned()));
            rest = after;
            continue;
        }
        let (name, after) = match after.strip_prefix('{') {
            Some(braced) => braced.split_once('}').ok_or_else(|| format!("`{to}` has a `${{` without `}}`"))?,
            None => after.split_at(after.find(|c: char| !c.is_ascii_alphanumeric() && c != '_').unwrap_or(after.len())),
        };
        pieces.push(Piece::Group(group(name, names)?));
        rest = after;
    }
    pieces.push(Piece::Text(rest.to_owned()));
    pieces.retain(|piece| !matches!(piece, Piece::Text(text) if text.is_empty()));
    Ok(pieces)
}

/// The index of the group `name`, which may be a number.
fn group(name: &str, names: &[Option<&str>]) -> Result<usize, String> {
    let found = match name.parse() {
        Ok(number) => Some(number).filter(|&number| number < names.len()),
        Err(_) => names.iter().position(|known| *known == Some(name)),
    };
    found.ok_or_else(|| {
        let digits = name.bytes().take_while(u8::is_ascii_digit).count();
        match &name[..digits] {
            "" => format!("the pattern has no group `{name}`; write `$$` for a plain `$`"),
            number if digits < name.len() => {
                format!("the pattern has no group `{name}`; did you mean `${{{number}}}`?")
            }
            _ => format!("the pattern has no group `{name}`, only {}", names.len() - 1),
        }
    })
}
