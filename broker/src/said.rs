//! Saying things once.

use std::{
    collections::BTreeSet,
    sync::{Mutex, PoisonError},
};

/// Most texts that are remembered; beyond that it begins anew.
const MOST: usize = 256;

/// Remembers what was said, so that a trouble that lasts is logged once and not with every message.
#[derive(Debug, Default)]
pub struct Said(Mutex<BTreeSet<String>>);

impl Said {
    /// Nothing was said yet.
    #[must_use]
    pub const fn new() -> Self {
        Self(Mutex::new(BTreeSet::new()))
    }

    /// Whether `text` is new; from now on it is not.
    pub fn is_new(&self, text: &str) -> bool {
        let mut said = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if said.contains(text) {
            return false;
        }
        if said.len() >= MOST {
            said.clear();
        }
        said.insert(text.to_owned())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_text_is_new_once() {
        let said = Said::new();
        assert!(said.is_new("a") && said.is_new("b") && !said.is_new("a") && !said.is_new("b"));
        (0..MOST).for_each(|index| assert!(said.is_new(&index.to_string())));
        assert!(said.0.lock().unwrap().len() <= MOST, "memory is bounded");
    }
}
