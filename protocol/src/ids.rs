//! Identities: names people choose, incarnations nobody chooses twice, and state ids.

use std::{fmt, str::FromStr};

use serde::{Deserialize, Serialize};

use crate::limits;

/// Claimed position of a worker in its job, `0..max_members`.
pub type Rank = u32;
/// One aggregation step of a sync job; rounds start at 1 and round `r` makes version `r`.
pub type Round = u64;
/// Number of rounds applied to a shard; a fresh shard has version 0.
pub type Version = u64;
/// Index of a shard in its job's layout.
pub type ShardIndex = u32;
/// Index of a virtual queue, `0..partitions`.
pub type Partition = u16;
/// Generation of a roster or of a partition's placement; only ever grows.
pub type Epoch = u64;

macro_rules! id128 {
    ($(#[$doc:meta])* $name:ident) => {
        $(#[$doc])*
        #[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
        #[serde(transparent)]
        pub struct $name(#[serde(with = "bytes16")] pub [u8; 16]);

        impl $name {
            /// A fresh random id.
            #[must_use]
            pub fn random() -> Self {
                Self(rand::random())
            }
        }

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                self.0.iter().try_for_each(|byte| write!(f, "{byte:02x}"))
            }
        }

        impl fmt::Debug for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                write!(f, concat!(stringify!($name), "({})"), self)
            }
        }

        impl FromStr for $name {
            type Err = InvalidId;

            fn from_str(text: &str) -> Result<Self, Self::Err> {
                let bad = || InvalidId(text.to_owned());
                if text.len() != 32 || !text.bytes().all(|byte| byte.is_ascii_hexdigit()) {
                    return Err(bad());
                }
                let mut bytes = [0; 16];
                for (index, byte) in bytes.iter_mut().enumerate() {
                    *byte = u8::from_str_radix(&text[2 * index..2 * index + 2], 16).map_err(|_| bad())?;
                }
                Ok(Self(bytes))
            }
        }
    };
}

/// A text that is not 32 hexadecimal digits.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{0:?} is not an id of 32 hexadecimal digits")]
pub struct InvalidId(String);

id128! {
    /// One life of a job, a worker, or an upload: random, so that leftovers of another life are
    /// recognised (rule P3).
    Incarnation
}
id128! {
    /// Names one version of one shard by its whole history (rule P5).
    StateId
}
id128! {
    /// Identity of a store's data directory (rule P26).
    StoreId
}

/// 16 bytes as one msgpack `bin`, not as an array of 16 integers.
mod bytes16 {
    use serde::{Deserializer, Serializer, de::Error};

    pub(super) fn serialize<S: Serializer>(bytes: &[u8; 16], serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_bytes(bytes)
    }

    pub(super) fn deserialize<'de, D: Deserializer<'de>>(deserializer: D) -> Result<[u8; 16], D::Error> {
        let bytes: serde_bytes::ByteArray<16> = serde::Deserialize::deserialize(deserializer)
            .map_err(|error| D::Error::custom(format!("an id is 16 bytes: {error}")))?;
        Ok(bytes.into_array())
    }
}

/// A tenant's or job's name: 1 to [`limits::MAX_NAME_BYTES`] of `a-z 0-9 - _`.
///
/// It becomes a NATS subject token, a KV key part and a metric label, so nothing else is allowed.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct Name(String);

impl Name {
    /// Checks `name`.
    ///
    /// # Errors
    /// [`InvalidName`] says which rule it breaks.
    pub fn new(name: impl Into<String>) -> Result<Self, InvalidName> {
        let name = name.into();
        let fits = (1..=limits::MAX_NAME_BYTES).contains(&name.len())
            && name.bytes().all(|b| b.is_ascii_lowercase() || b.is_ascii_digit() || b == b'-' || b == b'_');
        if fits { Ok(Self(name)) } else { Err(InvalidName(name)) }
    }

    /// The name as text.
    #[must_use]
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

/// A name outside the allowed alphabet or length.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{0:?} is not a valid name: use 1 to {max} of a-z, 0-9, '-' and '_'", max = limits::MAX_NAME_BYTES)]
pub struct InvalidName(pub String);

impl fmt::Display for Name {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl TryFrom<String> for Name {
    type Error = InvalidName;
    fn try_from(name: String) -> Result<Self, Self::Error> {
        Self::new(name)
    }
}

impl From<Name> for String {
    fn from(name: Name) -> Self {
        name.0
    }
}

impl FromStr for Name {
    type Err = InvalidName;
    fn from_str(name: &str) -> Result<Self, Self::Err> {
        Self::new(name)
    }
}

/// Which job, by the names people use; several incarnations may carry it one after another.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
pub struct JobKey {
    /// Owner of the job.
    pub tenant: Name,
    /// The job's name within its tenant.
    pub job: Name,
}

impl fmt::Display for JobKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.tenant, self.job)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ids_print_and_parse_as_hexadecimal() {
        let id = Incarnation(*b"0123456789abcdef");
        assert_eq!(id.to_string(), "30313233343536373839616263646566");
        assert_eq!(id.to_string().parse(), Ok(id));
        assert!("xyz".parse::<Incarnation>().is_err());
        assert!("é".repeat(16).parse::<Incarnation>().is_err());
    }

    #[test]
    fn names_are_subject_tokens() {
        assert!(Name::new("bert-base_2").is_ok());
        for bad in ["", "a.b", "A", "a b", "*", ">", "é", &"x".repeat(limits::MAX_NAME_BYTES + 1)] {
            assert_eq!(Name::new(bad), Err(InvalidName(bad.to_owned())));
        }
    }
}
