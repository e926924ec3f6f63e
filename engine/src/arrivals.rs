//! How long a request that arrives now would wait, and refusing it when that is too long.
//!
//! Between arrival and answer a request waits for a thread that decodes it and for the log. What waits, divided by the
//! rate at which requests have ended of late while there were any, is how long a new one would take. A sender that is
//! refused at once comes again; one that waits for longer than its patience sends the same while the first is still
//! worked on. A request that has waited for too long all the same is refused before any work is put into it.

use std::sync::Arc;
use std::time::Duration;

use catalog::{Error, Result};
use parking_lot::Mutex;
use tokio::time::Instant;

/// What a request may wait beyond what one write of the log takes.
const WAIT_MAX: Duration = Duration::from_millis(500);
/// The rate is measured over so much time in which requests were under way.
const MEASURED: Duration = Duration::from_millis(200);
/// What a request costs besides its bytes, in bytes.
const REQUEST_COST: usize = 4 << 10;

/// The requests between arrival and answer; cheap to clone.
#[derive(Debug, Clone, Default)]
pub(crate) struct Arrivals(Arc<Mutex<State>>);

#[derive(Debug, Default)]
struct State {
    requests: usize,
    /// Of all requests under way.
    cost: usize,
    /// What one write of the log took of late.
    write: Duration,
    /// When something last ended, or when the first of those under way arrived.
    moved: Option<Instant>,
    /// What has ended since `since`, and how much of that time requests were under way.
    ended: usize,
    busy: Duration,
    /// Cost a second; `None` until it was measured.
    rate: Option<f64>,
}

impl State {
    fn wait_max(&self) -> Duration {
        WAIT_MAX + self.write
    }

    /// How long what is under way will take, as far as that is known.
    fn wait(&self, now: Instant) -> Duration {
        let stalled = self.moved.filter(|_| self.requests > 0).map_or(Duration::ZERO, |moved| now - moved);
        let predicted = self.rate.map_or(0.0, |rate| self.cost as f64 / rate);
        stalled.max(Duration::try_from_secs_f64(predicted).unwrap_or(Duration::MAX))
    }

    /// Counts the time since the last change as one in which requests were under way.
    fn move_to(&mut self, now: Instant) {
        if let Some(moved) = self.moved.replace(now).filter(|_| self.requests > 0) {
            self.busy += now - moved;
        }
    }

    fn end(&mut self, cost: usize, now: Instant) {
        self.move_to(now);
        self.requests -= 1;
        self.cost -= cost;
        self.ended += cost;
        if self.busy >= MEASURED {
            let measured = self.ended as f64 / self.busy.as_secs_f64();
            self.rate = Some(self.rate.map_or(measured, |rate| (rate + measured) / 2.0));
            (self.ended, self.busy) = (0, Duration::ZERO);
        }
    }
}

impl Arrivals {
    /// Lets a request of so many bytes in, or refuses it.
    ///
    /// # Errors
    /// `Unavailable` when it would wait for too long.
    pub fn arrive(&self, bytes: usize) -> Result<Arrival> {
        let (now, cost) = (Instant::now(), bytes + REQUEST_COST);
        let mut state = self.0.lock();
        // The first one is always let in: there is nothing to wait for.
        if state.requests > 0 && state.wait(now) > state.wait_max() {
            return Err(Error::unavailable(format!(
                "{} requests wait, which will take {:.1} s; at most {:.1} s are allowed, try again",
                state.requests,
                state.wait(now).as_secs_f64(),
                state.wait_max().as_secs_f64()
            )));
        }
        if state.requests == 0 {
            state.moved = Some(now);
        }
        state.requests += 1;
        state.cost += cost;
        drop(state);
        Ok(Arrival { arrivals: self.clone(), at: now, cost })
    }

    /// Notes how long a write of the log took.
    pub fn note_write(&self, took: Duration) {
        self.0.lock().write = took;
    }
}

/// A request that was let in, until it is answered.
#[derive(Debug)]
pub struct Arrival {
    arrivals: Arrivals,
    at: Instant,
    cost: usize,
}

impl Arrival {
    /// Refuses a request that has waited for too long. To be called before work is put into it.
    ///
    /// # Errors
    /// `Unavailable`.
    pub fn check(&self) -> Result<()> {
        let (waited, allowed) = (self.at.elapsed(), self.arrivals.0.lock().wait_max());
        if waited > allowed {
            return Err(Error::unavailable(format!(
                "the request has waited for {:.1} s; at most {:.1} s are allowed, try again",
                waited.as_secs_f64(),
                allowed.as_secs_f64()
            )));
        }
        Ok(())
    }
}

impl Drop for Arrival {
    fn drop(&mut self) {
        self.arrivals.0.lock().end(self.cost, Instant::now());
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const BYTES: usize = 16 << 10;

    #[tokio::test(start_paused = true)]
    async fn as_many_are_let_in_as_end_in_time() {
        let arrivals = Arrivals::default();
        // Ten a second, one after another.
        for _ in 0..10 {
            let one = arrivals.arrive(BYTES).unwrap();
            tokio::time::advance(Duration::from_millis(100)).await;
            one.check().unwrap();
        }
        let mut waiting = Vec::new();
        while let Ok(one) = arrivals.arrive(BYTES) {
            waiting.push(one);
        }
        // Those before it would take more than half a second.
        assert_eq!(waiting.len(), 6);
        let refused = arrivals.arrive(BYTES).unwrap_err();
        assert_eq!(refused.to_string(), "6 requests wait, which will take 0.6 s; at most 0.5 s are allowed, try again");
        tokio::time::advance(Duration::from_millis(100)).await;
        waiting.pop();
        assert!(arrivals.arrive(BYTES).is_ok());
        // A slow log is waited for.
        arrivals.note_write(Duration::from_secs(1));
        while waiting.len() < 16 {
            waiting.push(arrivals.arrive(BYTES).unwrap());
        }
        assert!(waiting.last().unwrap().check().is_ok());
    }

    #[tokio::test(start_paused = true)]
    async fn nothing_is_let_in_while_nothing_ends() {
        let arrivals = Arrivals::default();
        let first = arrivals.arrive(BYTES).unwrap();
        tokio::time::advance(WAIT_MAX).await;
        let second = arrivals.arrive(BYTES).unwrap();
        tokio::time::advance(Duration::from_millis(1)).await;
        assert!(arrivals.arrive(BYTES).is_err());
        assert!(first.check().is_err());
        assert!(second.check().is_ok());
        drop((first, second));
        // The time without any is not counted, and the one request that is let in first finds nothing to wait for.
        tokio::time::advance(Duration::from_secs(3600)).await;
        assert!(arrivals.arrive(usize::MAX / 2).is_ok());
    }
}
