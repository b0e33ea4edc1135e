//! `forebay_phase_active` and `forebay_phase_oldest_seconds`: the exchanges in each phase, and the oldest of them.
//!
//! Each exchange in a phase has a [`PhaseGuard`]: one word with the phase and its start. The next phase is one store
//! into it, by the worker that runs the exchange; a scrape counts the words. Each thread keeps the slots that became
//! free on it, so workers contend for a lock only if one has no free slot left or far too many.

use std::cell::RefCell;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};
use std::time::{Duration, Instant};

use prometheus::core::{Collector, Desc};
use prometheus::proto::MetricFamily;

use super::family;
use crate::phase::Phase;

/// Number of slots that are allocated at once.
const ROW: usize = 256;
/// A thread with more free slots than this gives half of them back: if exchanges move between workers, they may all
/// begin on one and end on another.
const KEPT: usize = 4 * ROW;

/// All slots of one gateway. Clones share them.
#[derive(Clone)]
pub(super) struct PhaseTable(Arc<Slots>);

struct Slots {
    epoch: Instant,
    rows: Mutex<Vec<Arc<Row>>>,
    spare: Mutex<Vec<Slot>>,
}

/// Each word is 0 if its slot is free, else the start in microseconds since the epoch, shifted by [`PHASE_BITS`],
/// plus the phase, from 1.
struct Row {
    slots: Weak<Slots>,
    words: [AtomicU64; ROW],
}

const PHASE_BITS: u32 = 4;
const _: () = assert!(Phase::COUNT < 1 << PHASE_BITS);

struct Slot {
    row: Arc<Row>,
    index: usize,
}

impl Slot {
    fn word(&self) -> &AtomicU64 {
        &self.row.words[self.index]
    }
}

thread_local! {
    /// Free slots, usually all of one gateway.
    static FREE: RefCell<Vec<Slot>> = const { RefCell::new(Vec::new()) };
}

/// Counts an exchange or a connection in its phase until it is dropped.
pub struct PhaseGuard {
    epoch: Instant,
    /// `None` only during drop.
    slot: Option<Slot>,
}

impl PhaseGuard {
    /// Enters `phase`.
    pub fn enter(&self, phase: Phase, now: Instant) {
        if let Some(slot) = &self.slot {
            let micros = now.saturating_duration_since(self.epoch).as_micros() as u64;
            slot.word().store(micros << PHASE_BITS | (phase.index() as u64 + 1), Ordering::Relaxed);
        }
    }

    /// Enters `phase`, this long after the last one. Cheaper than [`PhaseGuard::enter`].
    pub fn advance(&self, phase: Phase, passed: Duration) {
        if let Some(slot) = &self.slot {
            let passed = passed.as_secs() * 1_000_000 + u64::from(passed.subsec_micros());
            let micros = (slot.word().load(Ordering::Relaxed) >> PHASE_BITS) + passed;
            slot.word().store(micros << PHASE_BITS | (phase.index() as u64 + 1), Ordering::Relaxed);
        }
    }
}

impl Drop for PhaseGuard {
    fn drop(&mut self) {
        let Some(slot) = self.slot.take() else { return };
        slot.word().store(0, Ordering::Relaxed);
        // A thread that is ending has no storage any more: the slot is lost, which does not matter.
        let _ = FREE.try_with(|free| {
            let mut free = free.borrow_mut();
            free.push(slot);
            if free.len() > KEPT {
                free.drain(KEPT / 2..).for_each(give_back);
            }
        });
    }
}

fn give_back(slot: Slot) {
    if let Some(slots) = slot.row.slots.upgrade() {
        lock(&slots.spare).push(slot);
    }
}

/// The state of a phase.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct PhaseState {
    /// Number of exchanges in it.
    pub active: u64,
    /// How long the oldest one has been in it; zero if it is empty.
    pub oldest: Duration,
}

impl PhaseTable {
    /// Empty phases.
    pub(super) fn new(epoch: Instant) -> Self {
        PhaseTable(Arc::new(Slots { epoch, rows: Mutex::default(), spare: Mutex::default() }))
    }

    /// Adds an exchange to `phase`, in which it has been since `since`.
    pub(super) fn take(&self, phase: Phase, since: Instant) -> PhaseGuard {
        let guard = PhaseGuard { epoch: self.0.epoch, slot: Some(self.slot()) };
        guard.enter(phase, since);
        guard
    }

    /// The state of all phases, in order.
    pub(super) fn states(&self, now: Instant) -> [PhaseState; Phase::COUNT] {
        let now = now.saturating_duration_since(self.0.epoch);
        let mut states = [PhaseState::default(); Phase::COUNT];
        for row in &*lock(&self.0.rows) {
            let words = row.words.iter().map(|word| word.load(Ordering::Relaxed));
            for word in words.filter(|&word| word != 0) {
                let state = &mut states[(word & ((1 << PHASE_BITS) - 1)) as usize - 1];
                state.active += 1;
                state.oldest = state.oldest.max(now.saturating_sub(Duration::from_micros(word >> PHASE_BITS)));
            }
        }
        states
    }

    fn slot(&self) -> Slot {
        FREE.with_borrow_mut(|free| {
            loop {
                match free.pop() {
                    Some(slot) if std::ptr::eq(slot.row.slots.as_ptr(), &*self.0) => return slot,
                    // A slot of another gateway on this thread, which happens only in tests.
                    Some(foreign) => give_back(foreign),
                    None => *free = self.more(),
                }
            }
        })
    }

    /// At least one free slot.
    fn more(&self) -> Vec<Slot> {
        let mut spare = lock(&self.0.spare);
        let from = spare.len().saturating_sub(ROW);
        if !spare.is_empty() {
            return spare.drain(from..).collect();
        }
        let row = Arc::new(Row { slots: Arc::downgrade(&self.0), words: [const { AtomicU64::new(0) }; ROW] });
        lock(&self.0.rows).push(row.clone());
        (0..ROW).map(|index| Slot { row: row.clone(), index }).collect()
    }
}

/// Held for a few pushes, and by a scrape while it reads the words.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Reads the slots on each scrape.
pub(super) struct PhaseCollector {
    table: PhaseTable,
    descs: [Desc; 2],
}

impl PhaseCollector {
    pub(super) fn new(table: PhaseTable) -> Self {
        PhaseCollector { table, descs: [family::PHASE_ACTIVE.describe(), family::PHASE_OLDEST.describe()] }
    }
}

impl Collector for PhaseCollector {
    fn desc(&self) -> Vec<&Desc> {
        self.descs.iter().collect()
    }

    fn collect(&self) -> Vec<MetricFamily> {
        let states = self.table.states(Instant::now());
        let named = || Phase::ALL.iter().map(|phase| phase.name()).zip(&states);
        vec![
            family::PHASE_ACTIVE.read(
                named().map(|(phase, state)| family::PHASE_ACTIVE.sample(&[phase], state.active as f64)).collect(),
            ),
            family::PHASE_OLDEST.read(
                named()
                    .map(|(phase, state)| family::PHASE_OLDEST.sample(&[phase], state.oldest.as_secs_f64()))
                    .collect(),
            ),
        ]
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ms(n: u64) -> Duration {
        Duration::from_millis(n)
    }

    fn of(table: &PhaseTable, phase: Phase, now: Instant) -> (u64, Duration) {
        let state = table.states(now)[phase.index()];
        (state.active, state.oldest)
    }

    #[test]
    fn each_is_in_one_phase_and_the_oldest_tells_for_how_long() {
        let begin = Instant::now();
        let table = PhaseTable::new(begin);
        let first = table.take(Phase::Header, begin + ms(10));
        let second = table.take(Phase::Header, begin + ms(40));
        assert_eq!(of(&table, Phase::Header, begin + ms(50)), (2, ms(40)));

        first.enter(Phase::Wait, begin + ms(60));
        assert_eq!(of(&table, Phase::Header, begin + ms(70)), (1, ms(30)));
        assert_eq!(of(&table, Phase::Wait, begin + ms(70)), (1, ms(10)));

        drop((first, second));
        assert_eq!(table.states(begin + ms(80)), [PhaseState::default(); Phase::COUNT]);
    }

    #[test]
    fn a_seat_that_is_free_is_taken_again() {
        let now = Instant::now();
        let table = PhaseTable::new(now);
        for _ in 0..10 * ROW {
            table.take(Phase::Route, now);
        }
        assert_eq!(lock(&table.0.rows).len(), 1);
    }

    #[test]
    fn seats_that_are_taken_on_one_thread_and_freed_on_another_do_not_pile_up() {
        let now = Instant::now();
        let table = PhaseTable::new(now);
        let (send, receive) = std::sync::mpsc::sync_channel::<PhaseGuard>(ROW);
        let other = std::thread::spawn(move || receive.into_iter().for_each(drop));
        for _ in 0..100 * KEPT {
            send.send(table.take(Phase::Route, now)).unwrap();
        }
        drop(send);
        other.join().unwrap();
        let rows = lock(&table.0.rows).len();
        assert!(rows <= 4 * KEPT / ROW, "{rows} rows of {ROW} slots for {ROW} who were there at once");
    }

    #[test]
    fn two_gateways_on_one_thread_have_seats_of_their_own() {
        let now = Instant::now();
        let (one, two) = (PhaseTable::new(now), PhaseTable::new(now));
        drop(one.take(Phase::Send, now));
        let _seat = two.take(Phase::Send, now);
        assert_eq!(of(&one, Phase::Send, now).0, 0);
        assert_eq!(of(&two, Phase::Send, now).0, 1);
    }

    #[test]
    fn who_entered_after_the_reading_began_is_not_older_than_nothing() {
        let begin = Instant::now();
        let table = PhaseTable::new(begin);
        let _seat = table.take(Phase::Send, begin + ms(5));
        assert_eq!(of(&table, Phase::Send, begin), (1, Duration::ZERO));
    }
}
