//! The CPU time of a thread, which other threads can read.

use std::io;
use std::mem::MaybeUninit;
use std::time::Duration;

/// The clock of a thread's CPU time.
#[derive(Clone, Copy, Debug)]
pub struct CpuClock(libc::clockid_t);

impl CpuClock {
    /// That of the thread that calls this.
    ///
    /// # Errors
    ///
    /// The system has none.
    pub fn own() -> io::Result<CpuClock> {
        let mut clock = MaybeUninit::uninit();
        // SAFETY: the call fills in the clock if it succeeds.
        match unsafe { libc::pthread_getcpuclockid(libc::pthread_self(), clock.as_mut_ptr()) } {
            // SAFETY: it has.
            0 => Ok(CpuClock(unsafe { clock.assume_init() })),
            error => Err(io::Error::from_raw_os_error(error)),
        }
    }

    /// How much CPU time the thread has had; zero after its end.
    pub fn time(self) -> Duration {
        let mut time = libc::timespec { tv_sec: 0, tv_nsec: 0 };
        // SAFETY: the structure lives until the call returns. The clock of a thread that has ended is an error, and
        // leaves the time at zero.
        unsafe { libc::clock_gettime(self.0, &raw mut time) };
        Duration::new(time.tv_sec.try_into().unwrap_or(0), time.tv_nsec.try_into().unwrap_or(0))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    use std::time::Instant;

    #[test]
    fn the_clock_of_a_thread_counts_its_own_time() {
        let clock = CpuClock::own().unwrap();
        let before = clock.time();
        let begun = Instant::now();
        while clock.time() == before && begun.elapsed() < Duration::from_secs(60) {
            std::hint::spin_loop();
        }
        assert!(clock.time() > before);
    }
}
