//! What valgrind's callgrind has counted.

use std::collections::HashMap;

/// Instructions of one or more processes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Counts {
    pub(super) all: u64,
    /// Those of code that is looked for, with all that it called, and of what was inlined from it.
    pub(super) part: u64,
}

/// Names that a profile gives once, with a number that stands for them from then on: `(12) name`, later `(12)`.
struct Names<'a> {
    of_part: fn(&str) -> bool,
    known: HashMap<&'a str, bool>,
}

impl<'a> Names<'a> {
    fn new(of_part: fn(&str) -> bool) -> Self {
        Self { of_part, known: HashMap::new() }
    }

    /// Whether what this names is of the part.
    fn are(&mut self, text: &'a str) -> bool {
        let Some((number, name)) = text.strip_prefix('(').and_then(|rest| rest.split_once(')')) else {
            return (self.of_part)(text);
        };
        let of_part = self.of_part;
        *self.known.entry(number).or_insert_with(|| of_part(name.trim_start()))
    }
}

impl Counts {
    /// Reads a profile in callgrind's format (Valgrind manual, *Callgrind Format Specification*). What is looked for is
    /// told by the names of functions and of source files. `None` where it counts nothing.
    pub(super) fn read(profile: &str, function: fn(&str) -> bool, file: fn(&str) -> bool) -> Option<Self> {
        let (mut functions, mut files) = (Names::new(function), Names::new(file));
        let (mut all, mut part) = (None, 0);
        // Of the function that the lines are about: whether it is looked for, and whether what is inlined there is.
        let (mut inside, mut inlined) = (false, false);
        // Of the call that the next line is about.
        let (mut callee, mut called) = (false, false);
        for line in profile.lines() {
            match line.split_once('=') {
                Some(("fn", name)) => inside = functions.are(name),
                Some(("cfn", name)) => callee = functions.are(name),
                Some(("fl" | "fi" | "fe", name)) => inlined = files.are(name),
                // Only so that its number is known.
                Some(("cfl" | "cfi", name)) => {
                    files.are(name);
                }
                Some(("calls", _)) => called = callee,
                Some(_) => {}
                None => {
                    if let Some(total) = line.strip_prefix("totals: ") {
                        all = all.or(total.trim().parse().ok());
                    } else if let Some(cost) = cost(line) {
                        // What is inside is counted where it is called from outside.
                        part += if !inside && (inlined || called) { cost } else { 0 };
                        called = false;
                    }
                }
            }
        }
        all.map(|all| Self { all, part })
    }

    /// Both together.
    pub(super) fn and(self, other: Self) -> Self {
        Self { all: self.all + other.all, part: self.part + other.part }
    }

    /// What there is more than in `other`.
    pub(super) fn since(self, other: Self) -> Self {
        Self { all: self.all.saturating_sub(other.all), part: self.part.saturating_sub(other.part) }
    }
}

/// Instructions of a line that has a place in the source, absolute or relative to the line before, and a cost.
fn cost(line: &str) -> Option<u64> {
    let (place, cost) = line.split_once(' ')?;
    let number = |text: &str| text.parse::<u64>().ok();
    let place = place == "*" || number(place.trim_start_matches(['+', '-'])).is_some();
    number(cost).filter(|_| place)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_part_is_counted_with_what_it_calls_and_what_is_inlined() {
        let profile = "\
version: 1
positions: line
events: Ir

fl=(1) src/run.rs
fn=(1) run
10 1000
cfi=(2) metrics-0.1/src/lib.rs
cfn=(2) <Registry as metrics::Recorder>::record
calls=3 7
+2 330
cfn=(3) malloc
calls=1 1
* 50
fi=(2)
-4 20
fe=(1)
+1 600

fl=(2)
fn=(2)
7 130
cfn=(3)
calls=3 1
+1 200

fl=(3) malloc.c
fn=(3)
1 250

totals: 2000
";
        // The call with all below it, and what is inlined; malloc by itself, and called by others, is not.
        let wanted: fn(&str) -> bool = |name| name.contains("metrics");
        assert_eq!(Counts::read(profile, wanted, wanted), Some(Counts { all: 2000, part: 350 }));
        assert_eq!(Counts::read(profile, |_| false, |_| false), Some(Counts { all: 2000, part: 0 }));
        assert_eq!(Counts::read("version: 1\n", wanted, wanted), None);
    }
}
