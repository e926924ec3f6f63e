//! From label bytes to references, one request at a time.
//!
//! A receiver walks its wire format and, for each tag set it meets, first asks [`Encoder::wire`] with the undecoded
//! bytes; only a set never seen in that form is decoded, checked and handed to [`Encoder::tags`]. What comes back is a
//! [`TagRef`], the position in the request's list of tag sets, which the rows of the batch carry. Nothing is published
//! here: a rejected request leaves no trace.

use std::collections::HashMap;
use std::sync::Arc;

use crate::registry::{HashedMap, Ordinal};
use crate::{Error, Registry, Result, Series, TagHasher, TagSet, TagSetBuilder};

/// Position of a tag set in [`Encoded::sets`].
pub type TagRef = u32;

/// A tag set of a request.
#[derive(Debug, Clone)]
pub enum EncodedSet {
    /// Published before; this is its ordinal.
    Known(Ordinal),
    /// Not published when the request was decoded.
    New {
        /// The set.
        series: Arc<Series>,
        /// Hashes of the wire forms in which it was met.
        wires: Vec<u128>,
    },
    /// Published before, met in new wire forms.
    Alias {
        /// Its ordinal.
        ordinal: Ordinal,
        /// Hashes of the wire forms in which it was met.
        wires: Vec<u128>,
    },
}

/// All tag sets that a request refers to, in order of first use.
#[derive(Debug, Default, Clone)]
pub struct Encoded {
    /// The sets; a [`TagRef`] is an index into this.
    pub sets: Vec<EncodedSet>,
}

/// Turns the tag sets of one request into references.
#[derive(Debug)]
pub struct Encoder<'r> {
    registry: &'r Registry,
    encoded: Encoded,
    by_ordinal: HashMap<Ordinal, TagRef, foldhash::fast::FixedState>,
    by_wire: HashedMap<u128, TagRef>,
    by_code: HashedMap<i64, (i64, TagRef)>,
    builder: TagSetBuilder,
    new: usize,
}

impl<'r> Encoder<'r> {
    pub(crate) fn new(registry: &'r Registry) -> Self {
        Self {
            registry,
            encoded: Encoded::default(),
            by_ordinal: HashMap::default(),
            by_wire: HashedMap::default(),
            by_code: HashedMap::default(),
            builder: TagSetBuilder::default(),
            new: 0,
        }
    }

    /// The database's hasher, for receivers whose wire form must be made canonical before it can be looked up.
    pub fn hasher(&self) -> &'r TagHasher {
        self.registry.hasher()
    }

    /// The references of the tag sets that were published in these wire forms, in their order. Asking for a whole
    /// request at once costs a fraction of asking one by one; for what is unknown, [`Encoder::met`] tells whether it came
    /// earlier in the request.
    pub fn lookup(&mut self, wires: &[u128]) -> Vec<Option<TagRef>> {
        self.by_ordinal.reserve(wires.len());
        self.encoded.sets.reserve(wires.len());
        let ordinals = self.registry.lookup_wires(wires);
        ordinals.into_iter().map(|ordinal| ordinal.map(|o| self.known(o))).collect()
    }

    /// The reference of a tag set that this request held before in this wire form and that was not known then.
    pub fn met(&self, wire: u128) -> Option<TagRef> {
        self.by_wire.get(&wire).copied()
    }

    /// The reference of a tag set that was met before in exactly these undecoded bytes, with the hash to hand to
    /// [`Encoder::tags`] otherwise. `domain` is a number of the receiver's own (see [`crate::TagHasher::wire`]).
    pub fn wire(&mut self, domain: u8, bytes: &[u8]) -> (Option<TagRef>, u128) {
        let wire = self.registry.hasher().wire(domain, bytes);
        if let Some(ordinal) = self.registry.lookup_wire(wire) {
            return (Some(self.known(ordinal)), wire);
        }
        (self.by_wire.get(&wire).copied(), wire)
    }

    fn known(&mut self, ordinal: Ordinal) -> TagRef {
        *self.by_ordinal.entry(ordinal).or_insert_with(|| {
            self.encoded.sets.push(EncodedSet::Known(ordinal));
            (self.encoded.sets.len() - 1) as TagRef
        })
    }

    /// The reference of a decoded tag set; `pairs` come in any order and are sorted in place. `wire` is what
    /// [`Encoder::wire`] returned, if the receiver asked it.
    ///
    /// # Errors
    /// `Invalid` for an empty or repeated name; `LimitExceeded` when the set is new and the series limit is reached,
    /// `Unavailable` when there is no memory for it for now; `Internal` on a code collision.
    pub fn tags(&mut self, pairs: &mut [(&str, &str)], wire: Option<u128>) -> Result<TagRef> {
        let canonical = self.builder.build(pairs)?;
        let id = self.registry.hasher().id(canonical);
        if let Some(ordinal) = self.registry.lookup(id)? {
            let r = self.known(ordinal);
            if let Some(wire) = wire {
                self.add_wire(r, wire);
            }
            return Ok(r);
        }
        if let Some((check, r)) = self.by_code.get(&id.code.0).copied() {
            if check != id.check {
                return Err(Error::internal(format!("tag set code {:#018x} belongs to another tag set", id.code.0)));
            }
            if let Some(wire) = wire {
                self.add_wire(r, wire);
            }
            return Ok(r);
        }
        self.registry.check_room(self.new)?;
        let series = Arc::new(Series::new(self.registry.hasher(), TagSet::from_canonical(canonical)));
        let r = self.encoded.sets.len() as TagRef;
        self.new += 1;
        self.encoded.sets.push(EncodedSet::New { series, wires: Vec::new() });
        self.by_code.insert(id.code.0, (id.check, r));
        if let Some(wire) = wire {
            self.add_wire(r, wire);
        }
        Ok(r)
    }

    fn add_wire(&mut self, r: TagRef, wire: u128) {
        if self.by_wire.insert(wire, r).is_some() {
            return;
        }
        let set = &mut self.encoded.sets[r as usize];
        match set {
            EncodedSet::New { wires, .. } | EncodedSet::Alias { wires, .. } => wires.push(wire),
            EncodedSet::Known(ordinal) => *set = EncodedSet::Alias { ordinal: *ordinal, wires: vec![wire] },
        }
    }

    /// The request's tag sets.
    pub fn finish(self) -> Encoded {
        self.encoded
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::tag::tag_set;

    fn kinds(encoded: &Encoded) -> Vec<String> {
        let text = |s: &EncodedSet| match s {
            EncodedSet::Known(o) => format!("known {o}"),
            EncodedSet::New { series, wires } => format!("new {:?} {}", series.tags, wires.len()),
            EncodedSet::Alias { ordinal, wires } => format!("alias {ordinal} {}", wires.len()),
        };
        encoded.sets.iter().map(text).collect()
    }

    /// Publishes a request's sets as the committer does.
    fn publish(registry: &Registry, encoded: &Encoded) -> Vec<Ordinal> {
        let ordinal = |s: &EncodedSet| match s {
            EncodedSet::Known(o) => *o,
            EncodedSet::New { series, wires } => registry.publish(series, wires, 0).unwrap(),
            EncodedSet::Alias { ordinal, wires } => {
                registry.publish(&registry.get(*ordinal).unwrap(), wires, 0).unwrap()
            }
        };
        encoded.sets.iter().map(ordinal).collect()
    }

    #[test]
    fn sets_are_named_once_and_known_once_published() {
        let registry = Registry::new(TagHasher::new(3), 100);
        let up = [("__name__", "up"), ("job", "j")];
        let mut e = registry.encoder();
        let (known, wire) = e.wire(1, b"up form 1");
        assert_eq!(known, None);
        assert_eq!(e.tags(&mut up.clone(), Some(wire)).unwrap(), 0);
        assert_eq!(e.wire(1, b"up form 1").0, Some(0));
        assert_eq!(e.wire(2, b"up form 1").0, None, "another protocol");
        let (_, second) = e.wire(1, b"up form 2");
        assert_eq!(e.tags(&mut [up[1], up[0]], Some(second)).unwrap(), 0, "the same set in another form");
        assert_eq!(e.tags(&mut [("__name__", "down")], None).unwrap(), 1);
        let encoded = e.finish();
        assert_eq!(kinds(&encoded), [r#"new {"__name__": "up", "job": "j"} 2"#, r#"new {"__name__": "down"} 0"#]);
        assert!(registry.is_empty(), "nothing is published by decoding");
        assert_eq!(publish(&registry, &encoded), [0, 1]);

        let mut e = registry.encoder();
        assert_eq!(e.tags(&mut [("__name__", "down")], None).unwrap(), 0);
        assert_eq!(e.wire(1, b"up form 2").0, Some(1));
        assert_eq!(e.wire(1, b"up form 1").0, Some(1));
        let (_, third) = e.wire(1, b"up form 3");
        assert_eq!(e.tags(&mut up.clone(), Some(third)).unwrap(), 1);
        assert_eq!(e.wire(1, b"up form 3").0, Some(1));
        let encoded = e.finish();
        assert_eq!(kinds(&encoded), ["known 1", "alias 0 1"]);
        assert_eq!(publish(&registry, &encoded), [1, 0]);
        assert_eq!(registry.encoder().wire(1, b"up form 3").0, Some(0));
    }

    #[test]
    fn known_sets_pass_the_limit() {
        let registry = Registry::new(TagHasher::new(3), 2);
        let mut e = registry.encoder();
        e.tags(&mut [("__name__", "a")], None).unwrap();
        publish(&registry, &e.finish());
        let mut e = registry.encoder();
        e.tags(&mut [("__name__", "b")], None).unwrap();
        let error = e.tags(&mut [("__name__", "c")], None).unwrap_err();
        assert_eq!(error.kind(), crate::ErrorKind::LimitExceeded);
        assert!(error.message().contains("series_limit"), "{error}");
        e.tags(&mut [("__name__", "a")], None).unwrap();
        e.tags(&mut [("__name__", "b")], None).unwrap();
        assert_eq!(registry.refused(), 1);
        assert_eq!(kinds(&e.finish()).len(), 2);
    }

    #[test]
    fn bad_labels_are_refused() {
        let registry = Registry::new(TagHasher::new(3), 2);
        let mut e = registry.encoder();
        for pairs in [vec![("", "x")], vec![("a", "1"), ("b", "1"), ("a", "2")]] {
            assert_eq!(e.tags(&mut pairs.clone(), None).unwrap_err().kind(), crate::ErrorKind::Invalid);
        }
        assert!(e.finish().sets.is_empty());
    }

    #[test]
    fn a_collision_within_a_request_is_seen() {
        let registry = Registry::new(TagHasher::new(3), 10);
        let mut e = registry.encoder();
        let id = registry.hasher().id(tag_set(&[("a", "b")]).unwrap().as_bytes());
        e.by_code.insert(id.code.0, (id.check + 1, 0));
        assert_eq!(e.tags(&mut [("a", "b")], None).unwrap_err().kind(), crate::ErrorKind::Internal);
    }
}
