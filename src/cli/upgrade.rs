//! `forebay upgrade`: replaces a running gateway by a new process, and reports the result.

use std::path::PathBuf;

use clap::Args;

use super::admin::Where;
use super::trace::encoded;
use super::{Failure, complain, print};
use crate::gateway::Builder;
use crate::gateway::upgrade::{Done, LONGEST, Outcome};

/// The arguments of `forebay upgrade`.
#[derive(Args)]
pub struct Upgrade {
    #[command(flatten)]
    place: Where,
    /// Start this program instead of the file of the running one
    #[arg(long, value_name = "FILE")]
    binary: Option<PathBuf>,
}

/// Requests the upgrade and waits for its result.
pub fn upgrade(builder: &Builder, asked: Upgrade) -> Result<(), Failure> {
    let target = match &asked.binary {
        None => "/upgrade".to_owned(),
        Some(path) => {
            let path = path.canonicalize().map_err(Failure::io(&format!("use `{}`", path.display())))?;
            let path = path.to_str().ok_or_else(|| Failure::Usage("the path of --binary is not UTF-8".to_owned()))?;
            format!("/upgrade?binary={}", encoded(path))
        }
    };
    let endpoint = asked.place.find_running(builder)?;
    let (status, body) = endpoint.post_whole(&target, LONGEST).map_err(Failure::Runtime)?;
    let Ok(outcome) = serde_json::from_slice::<Outcome>(&body) else {
        return Err(Failure::Runtime(endpoint.said(status, "/upgrade", &body)));
    };
    let Outcome { result, pid, version, error, report, .. } = outcome;
    if !report.is_empty() {
        complain(report.trim_end());
    }
    let why = error.unwrap_or_default();
    match result {
        Done::Done => print(&format!("process {pid} (forebay {version}) has taken over")),
        Done::Refused => Err(Failure::Config(format!("{why}; process {pid} continues"))),
        _ => Err(Failure::Runtime(format!("{why}; process {pid} continues"))),
    }
}
