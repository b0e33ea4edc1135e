//! Clients that perform a handshake for each request. wrk resumes sessions, and h2load performs only one handshake per
//! connection, so neither is suitable.

use std::io::{Read, Write};
use std::net::SocketAddr;
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Result, anyhow, ensure};

use crate::latency::{Sample, percentile_ms};
use crate::machine::Place;
use crate::secure::{Manner, NAME, told_session};
use crate::wrk::Summary;

/// Simultaneous clients.
const CLIENTS: usize = 8;

/// Runs clients that connect, perform a handshake, request a small response and close, as fast as they can, for
/// `seconds`. With `resume` they resume the sessions of earlier connections.
pub fn load(place: Place, address: SocketAddr, seconds: u64, resume: bool) -> Result<Summary> {
    let (start, length) = (Instant::now(), Duration::from_secs(seconds));
    let client = || -> Result<(Vec<Sample>, u64)> {
        place.take()?;
        let (mut samples, mut failed, mut manner) = (Vec::new(), 0, Manner::of(true));
        while start.elapsed() < length {
            let due = start.elapsed();
            match exchange(address, &mut manner, resume) {
                Ok(()) => samples.push(Sample { due, latency: start.elapsed() - due }),
                Err(error) => {
                    if failed == 0 {
                        eprintln!("  {error:#}");
                    }
                    failed += 1;
                }
            }
        }
        Ok((samples, failed))
    };
    let (samples, failed) = thread::scope(|scope| -> Result<(Vec<Sample>, u64)> {
        let clients: Vec<_> = (0..CLIENTS).map(|_| scope.spawn(client)).collect();
        let (mut samples, mut failed) = (Vec::new(), 0);
        for client in clients {
            let (more, lost) = client.join().map_err(|_| anyhow!("a client panicked"))??;
            samples.extend(more);
            failed += lost;
        }
        Ok((samples, failed))
    })?;
    let seconds = start.elapsed().as_secs_f64();
    let percentile = |share| percentile_ms(&samples, Duration::ZERO..Duration::MAX, share);
    ensure!(!samples.is_empty(), "no handshake came to an end");
    Ok(Summary {
        requests: samples.len() as u64,
        seconds,
        p50_ms: percentile(50).unwrap_or_default(),
        p99_ms: percentile(99).unwrap_or_default(),
        failed,
    })
}

fn exchange(address: SocketAddr, manner: &mut Manner, resume: bool) -> Result<()> {
    let mut link = manner.open(address)?;
    // A ticket may be used only once.
    manner.session = None;
    let request = format!("GET /small HTTP/1.1\r\nHost: {NAME}\r\nConnection: close\r\n\r\n");
    link.write_all(request.as_bytes())?;
    let (mut answer, mut space) = (Vec::new(), [0; 4096]);
    loop {
        match link.read(&mut space)? {
            0 => break,
            read => answer.extend_from_slice(&space[..read]),
        }
    }
    ensure!(answer.starts_with(b"HTTP/1.1 200"), "answered {:?}", String::from_utf8_lossy(&answer));
    if resume {
        manner.session = told_session();
    }
    Ok(())
}
