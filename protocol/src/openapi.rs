//! Schemas of what does not look in JSON as it does in Rust.

use std::borrow::Cow;

use utoipa::{
    PartialSchema, ToSchema,
    openapi::{ObjectBuilder, RefOr, Schema, Type},
};

use crate::{ErrorCode, Name, limits};

impl PartialSchema for Name {
    fn schema() -> RefOr<Schema> {
        let text = "Name of a tenant, or of a job within its tenant.";
        let schema = ObjectBuilder::new().schema_type(Type::String).description(Some(text));
        schema
            .pattern(Some("^[a-z0-9_-]+$"))
            .min_length(Some(1))
            .max_length(Some(limits::MAX_NAME_BYTES))
            .into()
    }
}

impl ToSchema for Name {
    fn name() -> Cow<'static, str> {
        "Name".into()
    }
}

impl PartialSchema for ErrorCode {
    fn schema() -> RefOr<Schema> {
        let text = "Stable code of an error. Programs match on it; texts may change.";
        let schema = ObjectBuilder::new().schema_type(Type::String).description(Some(text));
        schema.enum_values(Some(Self::ALL.iter().map(|code| code.as_str()))).into()
    }
}

impl ToSchema for ErrorCode {
    fn name() -> Cow<'static, str> {
        "ErrorCode".into()
    }
}
