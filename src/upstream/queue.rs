//! The queue of exchanges while all endpoints of an upstream are at their limits: first come, first served.
//!
//! An exchange that releases an endpoint gives a *turn* to the first in the queue only. A turn is permission to select
//! again. The exchange uses it, returns it if it does not help, or passes it on when it leaves the queue, so that an
//! exchange takes each free place. While exchanges wait, new exchanges join the queue instead of selecting. If the
//! queue is empty, this costs one atomic load. `proxy/queue.rs` waits and applies the time limit.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicU8, AtomicU32, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::{Context, Poll};
use std::time::{Duration, Instant};

use futures::task::AtomicWaker;

use crate::config::upstream::limits as written;
use crate::metrics::QueueMetrics;

/// The queue of one upstream, shared by all workers.
#[derive(Debug)]
pub struct Queue {
    /// Limit on waiting exchanges.
    size: u32,
    /// Time limit in the queue.
    pub timeout: Duration,
    /// Number of waiting exchanges.
    taken: AtomicU32,
    /// Number of waiting exchanges that accept any endpoint: these are never overtaken.
    ahead: AtomicU32,
    line: Mutex<Line>,
    metrics: QueueMetrics,
}

#[derive(Debug, Default)]
struct Line {
    tickets: u64,
    /// The exchanges that wait for a turn, in order of arrival.
    waiting: BTreeMap<u64, Arc<Slot>>,
    /// Turns that were given and not used yet.
    given: u32,
    /// Turns that were given while no exchange waited: the next ones in the queue get them. Some may be outdated.
    spare: u32,
}

/// The reason for a turn.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
enum Turn {
    /// No turn.
    None,
    /// An endpoint was released.
    One,
    /// Several may have been released: an exchange that finds one passes the turn on.
    Look,
}

#[derive(Debug, Default)]
struct Slot {
    /// A [`Turn`], changed only while the queue is locked.
    turn: AtomicU8,
    waker: AtomicWaker,
}

impl Slot {
    fn turn(&self) -> Turn {
        match self.turn.load(Ordering::Acquire) {
            0 => Turn::None,
            1 => Turn::One,
            _ => Turn::Look,
        }
    }
}

/// A place in the queue. Dropping it gives it up.
#[derive(Debug)]
pub struct Place {
    queue: Arc<Queue>,
    ticket: u64,
    slot: Arc<Slot>,
    since: Instant,
    /// Whether it does not accept every endpoint.
    choosy: bool,
    /// Spare turns that it took and could not use, although other exchanges might.
    unused: u32,
    served: bool,
}

impl Queue {
    /// The configured queue.
    pub fn new(written: &written::Queue, metrics: QueueMetrics) -> Queue {
        Queue {
            size: u32::try_from(written.size.0).unwrap_or(u32::MAX),
            timeout: written.timeout.0,
            taken: AtomicU32::new(0),
            ahead: AtomicU32::new(0),
            line: Mutex::default(),
            metrics,
        }
    }

    /// Number of waiting exchanges.
    pub fn len(&self) -> u32 {
        self.taken.load(Ordering::SeqCst)
    }

    /// Whether the queue is empty.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Whether an exchange that must not be overtaken is waiting.
    pub fn bars(&self) -> bool {
        self.ahead.load(Ordering::Relaxed) > 0
    }

    /// Joins the queue; `None`: it is full. `choosy`: it does not accept every endpoint, so others may overtake it.
    pub fn join(self: &Arc<Self>, choosy: bool, now: Instant) -> Option<Place> {
        let slot = Arc::new(Slot::default());
        let mut line = self.line();
        if self.taken.load(Ordering::Relaxed) >= self.size {
            return None;
        }
        let ticket = line.tickets;
        line.tickets += 1;
        line.waiting.insert(ticket, slot.clone());
        // Exchanges that release an endpoint from now on see this one. Earlier releases are unknown, so the first
        // in the queue tries once immediately.
        self.taken.fetch_add(1, Ordering::SeqCst);
        self.ahead.fetch_add(u32::from(!choosy), Ordering::SeqCst);
        if line.given == 0 && line.waiting.len() == 1 {
            line.give(Turn::Look, None);
        } else if line.spare > 0 {
            line.spare -= 1;
            line.give(Turn::One, None);
        }
        drop(line);
        self.metrics.length.inc();
        Some(Place { queue: Arc::clone(self), ticket, slot, since: now, choosy, unused: 0, served: false })
    }

    /// An endpoint was released: the first in the queue gets a turn.
    pub fn freed(&self) {
        if self.taken.load(Ordering::SeqCst) > 0 {
            self.line().give_or_spare(Turn::One, None);
        }
    }

    /// Capacity grew, or the set of endpoints changed: wakes up to `turns` waiting exchanges.
    pub fn changed(&self, turns: u32) {
        if self.taken.load(Ordering::SeqCst) == 0 {
            return;
        }
        let mut line = self.line();
        for turn in 0..turns {
            if !line.give(Turn::One, None) {
                line.spare = line.spare.saturating_add(turns - turn).min(self.size);
                return;
            }
        }
    }

    fn line(&self) -> MutexGuard<'_, Line> {
        // Held for a few instructions, by exchanges that wait or wake another one.
        self.line.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Line {
    /// Gives a turn to the first in the queue, or to the first after `behind`. `false`: there is none.
    fn give(&mut self, turn: Turn, behind: Option<u64>) -> bool {
        let first = behind.map_or(0, |ticket| ticket + 1);
        let Some(ticket) = self.waiting.range(first..).next().map(|(ticket, _)| *ticket) else { return false };
        let Some(slot) = self.waiting.remove(&ticket) else { return false };
        self.given += 1;
        slot.turn.store(turn as u8, Ordering::Release);
        slot.waker.wake();
        true
    }

    fn give_or_spare(&mut self, turn: Turn, behind: Option<u64>) {
        if !self.give(turn, behind) {
            self.spare = self.spare.saturating_add(1);
        }
    }
}

impl Place {
    /// When it joined the queue.
    pub fn since(&self) -> Instant {
        self.since
    }

    /// Ready once the exchange has a turn: then select, and call [`Place::missed`] or [`Place::served`].
    pub fn poll_turn(&self, cx: &Context<'_>) -> Poll<()> {
        self.slot.waker.register(cx.waker());
        if self.slot.turn() == Turn::None { Poll::Pending } else { Poll::Ready(()) }
    }

    /// Reports that the turn did not help. The exchange keeps its place in the queue.
    pub fn missed(&mut self) {
        let mut line = self.queue.line();
        if line.spare > 0 {
            // Another endpoint was released meanwhile, while no other exchange waited.
            line.spare -= 1;
            self.unused += u32::from(self.choosy);
            return;
        }
        let turn = self.slot.turn();
        line.given = line.given.saturating_sub(1);
        self.slot.turn.store(Turn::None as u8, Ordering::Release);
        line.waiting.insert(self.ticket, self.slot.clone());
        if self.choosy {
            // The free endpoint may suit an exchange further back.
            line.give_or_spare(turn, Some(self.ticket));
            for _ in 0..std::mem::take(&mut self.unused) {
                line.give_or_spare(Turn::One, Some(self.ticket));
            }
        }
    }

    /// Reports that the turn was used.
    pub fn served(mut self) {
        self.served = true;
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        let Place { queue, ticket, slot, choosy, unused, served, .. } = self;
        let mut line = queue.line();
        if line.waiting.remove(ticket).is_none() {
            line.given = line.given.saturating_sub(1);
            match (slot.turn(), *served) {
                (Turn::One | Turn::None, true) => {}
                (Turn::Look, true) => {
                    line.give(Turn::Look, None);
                }
                (turn, false) => line.give_or_spare(turn, None),
            }
            for _ in 0..*unused {
                line.give_or_spare(Turn::One, None);
            }
        }
        queue.ahead.fetch_sub(u32::from(!*choosy), Ordering::SeqCst);
        if queue.taken.fetch_sub(1, Ordering::SeqCst) == 1 {
            line.spare = 0;
        }
        drop(line);
        queue.metrics.length.dec();
        queue.metrics.seconds.observe(self.since.elapsed().as_secs_f64());
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    use std::sync::atomic::AtomicUsize;
    use std::thread;

    use futures::task::noop_waker;
    use proptest::prelude::*;

    fn queue(size: u64) -> Arc<Queue> {
        let metrics = crate::metrics::Metrics::new(100, Vec::new()).upstream("shop").limits.queue;
        let written = written::Queue { size: crate::config::units::Count(size), ..written::Queue::default() };
        Arc::new(Queue::new(&written, metrics))
    }

    fn join(queue: &Arc<Queue>) -> Place {
        queue.join(false, Instant::now()).expect("room in the queue")
    }

    fn has_turn(place: &Place) -> bool {
        place.poll_turn(&Context::from_waker(&noop_waker())).is_ready()
    }

    /// Which of these have a turn.
    fn turns(places: &[&Place]) -> Vec<bool> {
        places.iter().map(|place| has_turn(place)).collect()
    }

    #[test]
    fn the_first_looks_at_once_and_each_endpoint_that_is_let_go_is_one_turn_for_the_first_in_line() {
        let queue = queue(9);
        let (mut a, b, c) = (join(&queue), join(&queue), join(&queue));
        assert_eq!(turns(&[&a, &b, &c]), [true, false, false]);
        a.missed();
        assert_eq!(turns(&[&a, &b, &c]), [false, false, false]);
        queue.freed();
        queue.freed();
        assert_eq!(turns(&[&a, &b, &c]), [true, true, false]);
        a.served();
        b.served();
        assert!(!has_turn(&c));
        queue.freed();
        assert!(has_turn(&c));
    }

    #[test]
    fn whoever_finds_something_at_first_sight_lets_the_next_one_have_a_look() {
        let queue = queue(9);
        let (a, mut b, c) = (join(&queue), join(&queue), join(&queue));
        a.served();
        assert_eq!(turns(&[&b, &c]), [true, false]);
        b.missed();
        assert_eq!(turns(&[&b, &c]), [false, false], "there is nothing for those behind either");
    }

    #[test]
    fn one_whose_turn_came_to_nothing_keeps_its_place() {
        let queue = queue(9);
        let (mut a, b) = (join(&queue), join(&queue));
        a.missed();
        queue.freed();
        a.missed();
        queue.freed();
        assert_eq!(turns(&[&a, &b]), [true, false]);
    }

    #[test]
    fn one_who_is_gone_leaves_its_place_and_its_turn_to_others() {
        let queue = queue(2);
        let (a, b) = (join(&queue), join(&queue));
        assert!(queue.join(false, Instant::now()).is_none(), "it is full");
        drop(a);
        assert!(has_turn(&b));
        let c = join(&queue);
        drop(b);
        assert!(has_turn(&c));
        drop(c);
        assert!(queue.is_empty() && !queue.bars());
        assert_eq!((queue.metrics.length.get(), queue.metrics.seconds.get_sample_count()), (0, 3));
    }

    #[test]
    fn an_endpoint_that_is_let_go_while_all_have_turns_is_for_the_next_one() {
        let queue = queue(9);
        let mut a = join(&queue);
        queue.freed();
        let b = join(&queue);
        assert!(has_turn(&b));
        queue.freed();
        a.missed();
        assert!(has_turn(&a), "that one was for it");
    }

    #[test]
    fn a_turn_that_is_of_no_use_to_one_who_is_choosy_is_passed_on_to_those_behind() {
        let queue = queue(9);
        let mut choosy: Vec<Place> = (0..2).map(|_| queue.join(true, Instant::now()).unwrap()).collect();
        assert!(!queue.bars(), "others may overtake these");
        let mut last = join(&queue);
        assert!(queue.bars());
        choosy.iter_mut().for_each(Place::missed);
        last.missed();
        queue.freed();
        for place in &mut choosy {
            assert!(has_turn(place));
            place.missed();
        }
        assert!(has_turn(&last) && !has_turn(&choosy[0]));
    }

    #[test]
    fn when_everything_changes_as_many_have_turns_as_there_is_room_for() {
        let queue = queue(9);
        let mut places: Vec<Place> = (0..4).map(|_| join(&queue)).collect();
        places[0].missed();
        queue.changed(2);
        assert_eq!(turns(&places.iter().collect::<Vec<_>>()), [true, true, false, false]);
        queue.changed(u32::MAX);
        assert!(places.iter().all(has_turn));
    }

    /// An event in a test.
    #[derive(Clone, Copy, Debug)]
    enum Event {
        Come(bool),
        Run(usize),
        Release,
        Leave(usize),
        Grow,
    }

    fn events() -> impl Strategy<Value = Vec<Event>> {
        let plain = || {
            prop_oneof![
                4 => Just(Event::Come(false)),
                4 => any::<usize>().prop_map(Event::Run),
                3 => Just(Event::Release),
                1 => any::<usize>().prop_map(Event::Leave),
            ]
        };
        let odd = prop_oneof![18 => plain(), 2 => Just(Event::Come(true)), 1 => Just(Event::Grow)];
        prop_oneof![prop::collection::vec(plain(), 1..200), prop::collection::vec(odd, 1..200)]
    }

    proptest! {
        /// A model of an upstream with two endpoints; choosy exchanges accept only the second. Steps of different
        /// workers interleave: an exchange with a turn may run later.
        #[test]
        fn nobody_waits_while_there_is_room_for_it_and_nobody_is_overtaken(events in events()) {
            // If a turn goes to a choosy or a slow newcomer, it may come back after the following exchanges have
            // theirs.
            let strict = !events.iter().any(|event| matches!(event, Event::Come(true) | Event::Grow));
            let queue = queue(1_000);
            let mut room = [0_u32; 2];
            let mut held: Vec<usize> = vec![0, 1];
            let mut line: Vec<Place> = Vec::new();
            let pick = |room: &mut [u32; 2], choosy: bool| {
                let found = (0..2).find(|&endpoint| room[endpoint] > 0 && !(choosy && endpoint == 0))?;
                room[found] -= 1;
                Some(found)
            };
            let run = |line: &mut Vec<Place>, which: usize, room: &mut [u32; 2], held: &mut Vec<usize>| {
                let earlier = line[..which].iter().any(|place| !place.choosy && !has_turn(place));
                match pick(room, line[which].choosy) {
                    Some(endpoint) => {
                        assert!(!earlier || !strict, "it overtook one that any endpoint could serve");
                        held.push(endpoint);
                        line.remove(which).served();
                    }
                    None => line[which].missed(),
                }
            };
            for event in events {
                match event {
                    Event::Come(choosy) => match (!queue.bars()).then(|| pick(&mut room, choosy)).flatten() {
                        Some(endpoint) => held.push(endpoint),
                        None => {
                            line.push(queue.join(choosy, Instant::now()).unwrap());
                            let last = line.len() - 1;
                            if strict && has_turn(&line[last]) {
                                run(&mut line, last, &mut room, &mut held);
                            }
                        }
                    },
                    Event::Run(which) => {
                        let ready: Vec<usize> = (0..line.len()).filter(|&index| has_turn(&line[index])).collect();
                        if !ready.is_empty() {
                            run(&mut line, ready[which % ready.len()], &mut room, &mut held);
                        }
                    }
                    Event::Release => if let Some(endpoint) = held.pop() {
                        room[endpoint] += 1;
                        queue.freed();
                    },
                    Event::Leave(which) => if !line.is_empty() {
                        line.remove(which % line.len());
                    },
                    Event::Grow => {
                        room[1] += 1;
                        queue.changed(room.iter().sum());
                    }
                }
            }
            // An exchange with a turn uses it.
            while let Some(ready) = line.iter().position(has_turn) {
                run(&mut line, ready, &mut room, &mut held);
            }
            prop_assert!(line.is_empty() || room[1] == 0, "{} wait for {room:?}", line.len());
            prop_assert!(line.iter().all(|place| place.choosy) || room[0] == 0, "{} wait for {room:?}", line.len());
            prop_assert_eq!(queue.len() as usize, line.len());
        }
    }

    #[test]
    fn workers_that_come_and_go_at_once_leave_nobody_behind() {
        let queue = queue(1_000);
        let (room, served) = (AtomicU32::new(2), AtomicUsize::new(0));
        let pick = || room.fetch_update(Ordering::SeqCst, Ordering::SeqCst, |room| room.checked_sub(1)).is_ok();
        thread::scope(|scope| {
            for _ in 0..8 {
                scope.spawn(|| {
                    for _ in 0..2_000 {
                        if queue.bars() || !pick() {
                            let mut place = join(&queue);
                            loop {
                                futures::executor::block_on(std::future::poll_fn(|cx| place.poll_turn(cx)));
                                if pick() {
                                    place.served();
                                    break;
                                }
                                place.missed();
                            }
                        }
                        served.fetch_add(1, Ordering::SeqCst);
                        room.fetch_add(1, Ordering::SeqCst);
                        queue.freed();
                    }
                });
            }
        });
        assert_eq!((served.into_inner(), room.into_inner(), queue.len()), (16_000, 2, 0));
    }
}
