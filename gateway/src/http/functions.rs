//! The aggregation functions, for people and for forms.

use axum::Json;
use serde::Serialize;
use thalweg_functions::{Accepts, Description, Kind, Known};
use utoipa::ToSchema;

use super::problem::Problems;

/// All functions.
#[derive(Serialize, ToSchema)]
pub(super) struct FunctionList {
    functions: Vec<FunctionView>,
}

/// An aggregation function.
#[derive(Serialize, ToSchema)]
#[schema(as = Function)]
struct FunctionView {
    /// Its name in a specification.
    name: &'static str,
    kind: FunctionKind,
    /// Optimizer slots with its default settings.
    slots: usize,
    /// Optimizer slots with the settings that need most.
    most_slots: usize,
    /// Whether a schedule may change its `lr`.
    takes_schedule: bool,
    /// What may be set, for the function and for parameter groups.
    settings: Vec<SettingView>,
}

/// `reduction`: a result of each round's contributions alone. `optimizer`: parameters that contributions move.
#[derive(Serialize, ToSchema)]
#[serde(rename_all = "snake_case")]
enum FunctionKind {
    Reduction,
    Optimizer,
}

/// A setting.
#[derive(Serialize, ToSchema)]
#[schema(as = FunctionSetting)]
struct SettingView {
    /// Its name.
    name: &'static str,
    /// What it may be, in words.
    accepted: &'static str,
    #[serde(flatten)]
    value: ValueView,
}

/// What a setting may be. Numbers are compared after rounding to f32.
#[derive(Serialize, ToSchema)]
#[serde(tag = "type", rename_all = "snake_case")]
enum ValueView {
    /// A number within bounds.
    Number {
        /// What it is when left out; `null` where it has to be given.
        default: Option<f64>,
        /// At least this.
        minimum: Option<f32>,
        /// Above this.
        exclusive_minimum: Option<f32>,
        /// Below this.
        exclusive_maximum: Option<f32>,
    },
    /// True or false.
    Flag {
        /// What it is when left out.
        default: bool,
    },
}

impl From<&Known> for SettingView {
    fn from(known: &Known) -> Self {
        let (accepted, value) = match known.accepts {
            Accepts::Number { range, default } => {
                let value = ValueView::Number {
                    default,
                    minimum: range.minimum,
                    exclusive_minimum: range.above,
                    exclusive_maximum: range.below,
                };
                (range.accepted, value)
            }
            Accepts::Flag { accepted, default } => (accepted, ValueView::Flag { default }),
        };
        Self { name: known.name, accepted, value }
    }
}

impl From<&Description> for FunctionView {
    fn from(function: &Description) -> Self {
        Self {
            name: function.name,
            kind: match function.kind {
                Kind::Reduction => FunctionKind::Reduction,
                Kind::Optimizer => FunctionKind::Optimizer,
            },
            slots: function.slots,
            most_slots: function.most_slots,
            takes_schedule: function.takes_schedule(),
            settings: function.settings.iter().map(Into::into).collect(),
        }
    }
}

/// List the aggregation functions
#[utoipa::path(get, path = "/v1/functions", operation_id = "listFunctions", tag = "functions", responses(
    (status = 200, description = "The functions with their settings.", body = FunctionList), Problems,
))]
pub(super) async fn list() -> Json<FunctionList> {
    Json(FunctionList { functions: thalweg_functions::describe().iter().map(Into::into).collect() })
}
