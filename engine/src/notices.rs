//! What a statement has to say besides its result: whoever finds something out while it runs adds it, and the edge tells the
//! client.

use parking_lot::Mutex;

/// Something to be told.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Notice {
    /// The result may be wrong; otherwise it is only worth knowing.
    pub is_warning: bool,
    /// What it is.
    pub text: String,
}

/// Notices are kept up to this number.
const NOTICES_MAX: usize = 100;

/// The notices of the statement that runs. A session carries it as a config extension.
#[derive(Debug, Default)]
pub struct Notices(Mutex<Vec<Notice>>);

impl Notices {
    /// Adds one, unless it is there already.
    pub fn add(&self, notice: Notice) {
        let mut all = self.0.lock();
        if all.len() < NOTICES_MAX && !all.contains(&notice) {
            all.push(notice);
        }
    }

    /// All that were added since.
    pub fn take(&self) -> Vec<Notice> {
        std::mem::take(&mut *self.0.lock())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn notices_are_told_once_and_bounded() {
        let notices = Notices::default();
        for i in 0..300 {
            notices.add(Notice { is_warning: i % 2 == 0, text: (i / 2).to_string() });
            notices.add(Notice { is_warning: i % 2 == 0, text: (i / 2).to_string() });
        }
        let told = notices.take();
        assert_eq!(told.len(), NOTICES_MAX);
        assert_eq!(told[1], Notice { is_warning: false, text: "0".to_owned() });
        assert!(notices.take().is_empty());
    }
}
