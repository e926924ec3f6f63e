//! Slows down whoever guesses.

use std::collections::HashMap;
use std::net::{IpAddr, Ipv6Addr};
use std::time::Duration;

use parking_lot::Mutex;
use tokio::time::Instant;

/// Failures of an address that cost it nothing: people mistype.
const FREE: u32 = 10;
/// The longest wait.
const WAIT_MAX: Duration = Duration::from_secs(60);
/// An address that has not failed for so long starts anew.
const FORGET: Duration = Duration::from_secs(600);
/// Most addresses that are remembered; beyond, the one that failed least recently is forgotten.
const ADDRESSES_MAX: usize = 4096;

/// Failed attempts by address.
#[derive(Debug, Default)]
pub(crate) struct Throttle(Mutex<HashMap<IpAddr, Failures>>);

#[derive(Debug, Clone, Copy)]
struct Failures {
    count: u32,
    last: Instant,
}

impl Failures {
    /// Until when nothing is checked for the address: twice as long with each failure.
    fn until(&self) -> Instant {
        let doublings = self.count.saturating_sub(FREE);
        if doublings == 0 {
            return self.last;
        }
        self.last + Duration::from_secs(1 << (doublings - 1).min(16)).min(WAIT_MAX)
    }
}

impl Throttle {
    /// Counts a failure.
    pub fn failed(&self, address: IpAddr) {
        let (mut table, now) = (self.0.lock(), Instant::now());
        let key = key(address);
        if !table.contains_key(&key) && table.len() >= ADDRESSES_MAX {
            table.retain(|_, f| now - f.last < FORGET);
            let oldest = table.iter().min_by_key(|(_, f)| f.last).map(|(key, _)| *key);
            if let Some(oldest) = oldest.filter(|_| table.len() >= ADDRESSES_MAX) {
                table.remove(&oldest);
            }
        }
        let failures = table.entry(key).or_insert(Failures { count: 0, last: now });
        if now - failures.last >= FORGET {
            failures.count = 0;
        }
        *failures = Failures { count: failures.count.saturating_add(1), last: now };
    }

    /// Whole seconds that the address must wait, if it must.
    pub fn wait(&self, address: IpAddr) -> Option<u32> {
        let failures = *self.0.lock().get(&key(address))?;
        let left = failures.until().checked_duration_since(Instant::now())?;
        (!left.is_zero()).then(|| left.as_secs_f64().ceil() as u32)
    }
}

/// One client has a /64 of IPv6 addresses to try from.
fn key(address: IpAddr) -> IpAddr {
    match address.to_canonical() {
        IpAddr::V6(v6) => IpAddr::V6(Ipv6Addr::from_bits(v6.to_bits() >> 64 << 64)),
        v4 => v4,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test(start_paused = true)]
    async fn waits_double_and_end() {
        let throttle = Throttle::default();
        let address: IpAddr = "192.0.2.1".parse().unwrap();
        for _ in 0..FREE {
            throttle.failed(address);
            assert_eq!(throttle.wait(address), None);
        }
        for expected in [1, 2, 4, 8, 16, 32, 60, 60] {
            throttle.failed(address);
            assert_eq!(throttle.wait(address), Some(expected));
        }
        assert_eq!(throttle.wait("192.0.2.2".parse().unwrap()), None);
        tokio::time::advance(Duration::from_secs(60)).await;
        assert_eq!(throttle.wait(address), None);
        tokio::time::advance(FORGET).await;
        throttle.failed(address);
        assert_eq!(throttle.wait(address), None);
    }

    #[tokio::test(start_paused = true)]
    async fn the_table_is_bounded_and_forgets_the_oldest() {
        let throttle = Throttle::default();
        let address = |n: u32| IpAddr::V4(n.into());
        for n in 0..2 * ADDRESSES_MAX as u32 {
            throttle.failed(address(n));
            tokio::time::advance(Duration::from_millis(1)).await;
        }
        let table = throttle.0.lock();
        assert_eq!(table.len(), ADDRESSES_MAX);
        assert!(table.contains_key(&address(2 * ADDRESSES_MAX as u32 - 1)));
        assert!(!table.contains_key(&address(0)));
    }

    #[tokio::test(start_paused = true)]
    async fn a_client_is_a_network_of_ipv6() {
        let throttle = Throttle::default();
        for n in 0..=FREE {
            throttle.failed(format!("2001:db8::{n}").parse().unwrap());
        }
        assert!(throttle.wait("2001:db8::ffff".parse().unwrap()).is_some());
        assert!(throttle.wait("2001:db8:0:1::1".parse().unwrap()).is_none());
    }
}
