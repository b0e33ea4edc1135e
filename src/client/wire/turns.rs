//! The turns that a response takes with the other bulk transfers of its worker.

use std::sync::Arc;
use std::task::{Context, Poll, ready};

use super::super::lane::{Bulk, Class, Lanes, Turn};

/// The state of a response in the lane of its worker.
pub(super) struct Turns {
    pub(super) lanes: Arc<Lanes>,
    pub(super) turn: Option<Turn>,
    /// Registration as a bulk transfer.
    pub(super) bulk: Option<Bulk>,
    /// More may be received, and nothing was received since this became true.
    pub(super) admitted: bool,
    /// The class of the turn that the last poll used.
    pub(super) used: Option<Class>,
}

impl Turns {
    pub(super) fn new(lanes: Arc<Lanes>) -> Self {
        Turns { lanes, turn: None, bulk: None, admitted: false, used: None }
    }

    /// Gives up the place in the lane.
    pub(super) fn leave(&mut self) {
        (self.turn, self.bulk, self.admitted) = (None, None, false);
    }

    /// Whether the number of bulk transfers requires turns. This response counts as one from now on.
    pub(super) fn is_crowded(&mut self) -> bool {
        let Turns { bulk, lanes, .. } = self;
        bulk.get_or_insert_with(|| lanes.here().enter()).is_crowded()
    }

    /// Ready when a turn of this class begins. `missing`: the bytes that the response still lacks; `disk`: it needs the
    /// disk.
    pub(super) fn poll(&mut self, cx: &mut Context<'_>, class: Class, missing: u64, disk: bool) -> Poll<()> {
        self.turn.take_if(|turn| turn.class() != class);
        let Turns { turn, lanes, .. } = self;
        ready!(turn.get_or_insert_with(|| lanes.here().queue(class, missing, disk)).poll(cx));
        self.turn = None;
        self.used = Some(class);
        Poll::Ready(())
    }
}
