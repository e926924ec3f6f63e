//! Hardship from outside, against the real process: kills, power loss, a full disk, damaged files, little memory, too
//! much load, hostile queries, damaged requests, clocks that jump.
//!
//! Every scenario has a [`ledger::Ledger`] that knows what each writer was told, and afterwards compares it with all that
//! the server gives back. A small run belongs to the gate; these variables make it long: `CRASH_SEEDS` (runs),
//! `CRASH_CYCLES` (kills, rounds or damages of a run), `CRASH_SECONDS`. With `THALWEG_BIN` another build of the server is
//! tried. Each run prints its figures as a line of a table.

mod clock;
mod damage;
pub mod disk;
mod disk_full;
mod group;
mod hostile;
mod kill;
mod ledger;
mod memory;
mod mutation;
mod object_log;
mod overload;
mod power_loss;
mod speed;
mod stop;

/// How long a run is: the variable, or what the gate has time for.
fn extent(variable: &str, gate: u64) -> u64 {
    std::env::var(variable).map_or(gate, |text| text.parse().unwrap_or_else(|_| panic!("{variable} is no number")))
}

/// One line of the table of figures.
fn figures(scenario: &str, seed: u64, cells: &[(&str, String)]) {
    let cells: String = cells.iter().map(|(name, value)| format!(" {name} {value} |")).collect();
    eprintln!("| {scenario} | seed {seed} |{cells}");
}
