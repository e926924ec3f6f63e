//! What the end-to-end tests stand on: the server as a child process, and clients.
//!
//! A [`Server`] has a folder and ports of its own. When it goes out of scope it is killed, and a warning or error in its
//! log that the test did not announce fails the test.

pub mod http;
pub mod postgres;
pub mod programs;
pub mod remote_write;
pub mod s3;
pub mod server;

pub use http::{Client, Response};
pub use postgres::Postgres;
pub use programs::{Process, free_port, output, program, python, run};
pub use remote_write::{Series, series};
pub use server::{Down, Server, Setup};

/// A small random number generator (SplitMix64): tests print the seed with which they failed.
#[derive(Debug, Clone)]
pub struct Random(pub u64);

impl Random {
    /// The next number.
    pub fn number(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    /// A number below `limit`.
    pub fn below(&mut self, limit: u64) -> u64 {
        self.number() % limit
    }
}

/// Milliseconds since the epoch.
#[expect(clippy::disallowed_methods, reason = "tests stand outside the server and have no clock to inject")]
pub fn now_ms() -> i64 {
    let since = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH);
    since.expect("the clock is after 1970").as_millis() as i64
}

/// Calls `probe` until it gives a value. Fails after a minute, which only a hang can use up.
pub fn wait_for<T>(what: &str, mut probe: impl FnMut() -> Option<T>) -> T {
    let begun = std::time::Instant::now();
    loop {
        if let Some(value) = probe() {
            return value;
        }
        assert!(begun.elapsed().as_secs() < 60, "waited a minute for {what}");
        std::thread::sleep(std::time::Duration::from_millis(20));
    }
}
