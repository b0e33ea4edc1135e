//! The grants that a response needs beside the other bulk transfers of its worker.

use std::sync::Arc;
use std::task::{Context, Poll, ready};

use crate::scheduler::{Bulk, Class, Grant, Schedulers};

/// The state of a response in the scheduler of its worker.
pub(super) struct Grants {
    pub(super) schedulers: Arc<Schedulers>,
    pub(super) grant: Option<Grant>,
    /// Registration as a bulk transfer.
    pub(super) bulk: Option<Bulk>,
    /// More may be received, and nothing was received since this became true.
    pub(super) admitted: bool,
    /// The class of the grant that the last poll used.
    pub(super) used: Option<Class>,
}

impl Grants {
    pub(super) fn new(schedulers: Arc<Schedulers>) -> Self {
        Grants { schedulers, grant: None, bulk: None, admitted: false, used: None }
    }

    /// Gives up the place in the queue.
    pub(super) fn leave(&mut self) {
        (self.grant, self.bulk, self.admitted) = (None, None, false);
    }

    /// Whether the number of bulk transfers requires grants. This response counts as one from now on.
    pub(super) fn is_crowded(&mut self) -> bool {
        let Grants { bulk, schedulers, .. } = self;
        bulk.get_or_insert_with(|| schedulers.here().begin_bulk()).is_crowded()
    }

    /// Ready when a grant of this class is given. `missing`: the bytes that the response still lacks; `disk`: it needs
    /// the disk.
    pub(super) fn poll(&mut self, cx: &mut Context<'_>, class: Class, missing: u64, disk: bool) -> Poll<()> {
        self.grant.take_if(|grant| grant.class() != class);
        let Grants { grant, schedulers, .. } = self;
        ready!(grant.get_or_insert_with(|| schedulers.here().request(class, missing, disk)).poll(cx));
        self.grant = None;
        self.used = Some(class);
        Poll::Ready(())
    }
}
