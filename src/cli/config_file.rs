//! Finds the configuration: `-c`, else `$FOREBAY_CONFIG`, else the first of two default paths that exists.

use std::env;
use std::path::{Path, PathBuf};

use super::{ConfigFile, Failure};
use crate::config::Config;
use crate::gateway::Builder;

const PLACES: [&str; 2] = ["./forebay.yaml", "/etc/forebay/forebay.yaml"];

impl ConfigFile {
    /// Finds the configuration.
    pub fn find(self) -> Result<PathBuf, Failure> {
        let named = env::var_os("FOREBAY_CONFIG").filter(|name| !name.is_empty()).map(PathBuf::from);
        find(self.path, named, Path::exists).map_err(Failure::Config)
    }

    /// Finds and reads the configuration.
    pub fn load(self, builder: &Builder) -> Result<(PathBuf, Config), Failure> {
        let path = self.find()?;
        let config = builder.load(&path).map_err(Failure::Report)?;
        Ok((path, config))
    }
}

/// A path that was given explicitly is used even if the file does not exist: that is then an error, and no other
/// file runs by surprise.
fn find(option: Option<PathBuf>, variable: Option<PathBuf>, exists: impl Fn(&Path) -> bool) -> Result<PathBuf, String> {
    let usual = || PLACES.map(PathBuf::from).into_iter().find(|place| exists(place));
    option.or(variable).or_else(usual).ok_or_else(|| {
        let [here, system] = PLACES;
        format!("no configuration: neither {here} nor {system} exists; name a file with -c FILE or $FOREBAY_CONFIG")
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn found(option: Option<&str>, variable: Option<&str>, existing: &[&str]) -> Result<PathBuf, String> {
        find(option.map(PathBuf::from), variable.map(PathBuf::from), |path| {
            existing.iter().any(|place| Path::new(place) == path)
        })
    }

    #[test]
    fn the_option_wins_over_the_variable_and_that_over_the_usual_places() {
        assert_eq!(found(Some("a"), Some("b"), &PLACES), Ok("a".into()));
        assert_eq!(found(None, Some("b"), &PLACES), Ok("b".into()));
        assert_eq!(found(None, None, &PLACES), Ok(PLACES[0].into()));
        assert_eq!(found(None, None, &PLACES[1..]), Ok(PLACES[1].into()));
    }

    #[test]
    fn the_error_names_every_place() {
        let error = found(None, None, &[]).unwrap_err();
        assert!(PLACES.iter().all(|place| error.contains(place)), "{error}");
    }
}
