"""Concepts: what neurons mean, judged by the labels of their top images or by a text that describes these."""

from typing import TYPE_CHECKING

from sae_ray.lazy import exports

if TYPE_CHECKING:
    from sae_ray.concepts.agreeing import Agreement as Agreement
    from sae_ray.concepts.agreeing import Pairs as Pairs
    from sae_ray.concepts.agreeing import agreement as agreement
    from sae_ray.concepts.atoms import coherence as coherence
    from sae_ray.concepts.benchmark import read_benchmark as read_benchmark
    from sae_ray.concepts.best_words import BestWords as BestWords
    from sae_ray.concepts.concept_files import read_concepts as read_concepts
    from sae_ray.concepts.config import Concepts as Concepts
    from sae_ray.concepts.correlations import correlation as correlation
    from sae_ray.concepts.correlations import label_correlation as label_correlation
    from sae_ray.concepts.cosines import cosine as cosine
    from sae_ray.concepts.cosines import cosine_cubed as cosine_cubed
    from sae_ray.concepts.cosines import decoder_cosine as decoder_cosine
    from sae_ray.concepts.dissect import soft_wpmi as soft_wpmi
    from sae_ray.concepts.dissect import wpmi as wpmi
    from sae_ray.concepts.entropies import entropy as entropy
    from sae_ray.concepts.entropies import label_entropy as label_entropy
    from sae_ray.concepts.feature_monosemanticity import FMS as FMS
    from sae_ray.concepts.feature_monosemanticity import fms as fms
    from sae_ray.concepts.hierarchy import group_means as group_means
    from sae_ray.concepts.hierarchy import lca_counts as lca_counts
    from sae_ray.concepts.hierarchy import lca_depth as lca_depth
    from sae_ray.concepts.hierarchy import lca_mode as lca_mode
    from sae_ray.concepts.label_scoring import LabelScores as LabelScores
    from sae_ray.concepts.label_scoring import LabelSummary as LabelSummary
    from sae_ray.concepts.label_scoring import label_scores as label_scores
    from sae_ray.concepts.label_scoring import label_summary as label_summary
    from sae_ray.concepts.labelling import Concept as Concept
    from sae_ray.concepts.labelling import best_of_each as best_of_each
    from sae_ray.concepts.labelling import image_classes as image_classes
    from sae_ray.concepts.labelling import label_concepts as label_concepts
    from sae_ray.concepts.labelling import mean_embeddings as mean_embeddings
    from sae_ray.concepts.labelling import search as search
    from sae_ray.concepts.labels import Labels as Labels
    from sae_ray.concepts.logistic_probes import BestProbes as BestProbes
    from sae_ray.concepts.logistic_probes import JudgedProbes as JudgedProbes
    from sae_ray.concepts.logistic_probes import LatentProbes as LatentProbes
    from sae_ray.concepts.logistic_probes import best_probes as best_probes
    from sae_ray.concepts.logistic_probes import judge_probes as judge_probes
    from sae_ray.concepts.logistic_probes import latent_probes as latent_probes
    from sae_ray.concepts.measuring import measure as measure
    from sae_ray.concepts.naming import class_names as class_names
    from sae_ray.concepts.naming import class_of as class_of
    from sae_ray.concepts.naming_by_answers import AnsweredNames as AnsweredNames
    from sae_ray.concepts.naming_by_answers import Trials as Trials
    from sae_ray.concepts.naming_by_answers import affirms as affirms
    from sae_ray.concepts.naming_by_answers import answered_names as answered_names
    from sae_ray.concepts.naming_by_answers import name_scores as name_scores
    from sae_ray.concepts.naming_by_answers import random_images as random_images
    from sae_ray.concepts.naming_by_answers import trials as trials
    from sae_ray.concepts.orders import rank_reorder as rank_reorder
    from sae_ray.concepts.overlap import Uniqueness as Uniqueness
    from sae_ray.concepts.overlap import count_above as count_above
    from sae_ray.concepts.overlap import shared_pairs as shared_pairs
    from sae_ray.concepts.overlap import uniqueness as uniqueness
    from sae_ray.concepts.ranking import average_precisions as average_precisions
    from sae_ray.concepts.recovery import QStar as QStar
    from sae_ray.concepts.recovery import k_unique as k_unique
    from sae_ray.concepts.recovery import largest_k as largest_k
    from sae_ray.concepts.recovery import q_star as q_star
    from sae_ray.concepts.recovery import q_star_of_ridge as q_star_of_ridge
    from sae_ray.concepts.recovery import rip_bound as rip_bound
    from sae_ray.concepts.recovery import welch_bound as welch_bound
    from sae_ray.concepts.second_moment import SecondMoment as SecondMoment
    from sae_ray.concepts.second_moment import aip_cosines as aip_cosines
    from sae_ray.concepts.second_moment import mean_angle as mean_angle
    from sae_ray.concepts.second_moment import whitening as whitening
    from sae_ray.concepts.sparse_probes import SparseProbe as SparseProbe
    from sae_ray.concepts.sparse_probes import purity as purity
    from sae_ray.concepts.sparse_probes import sparse_probing as sparse_probing
    from sae_ray.concepts.spatial import morans_i as morans_i
    from sae_ray.concepts.splits import Halves as Halves
    from sae_ray.concepts.splits import balanced_rows as balanced_rows
    from sae_ray.concepts.splits import halves as halves
    from sae_ray.concepts.splits import shuffled_labels as shuffled_labels
    from sae_ray.concepts.stability import matched_cosine as matched_cosine
    from sae_ray.concepts.statistics import ClassStats as ClassStats
    from sae_ray.concepts.statistics import merged as merged
    from sae_ray.concepts.tables import ConceptTables as ConceptTables
    from sae_ray.concepts.targeted_perturbation import TPP as TPP
    from sae_ray.concepts.targeted_perturbation import tpp as tpp
    from sae_ray.concepts.taxonomy import image_paths as image_paths
    from sae_ray.concepts.taxonomy import inaturalist_taxonomy as inaturalist_taxonomy
    from sae_ray.concepts.taxonomy import read_taxonomy as read_taxonomy
    from sae_ray.concepts.vocabulary import Vocabulary as Vocabulary
    from sae_ray.concepts.vocabulary import class_vocabulary as class_vocabulary
    from sae_ray.concepts.vocabulary import read_vocabulary as read_vocabulary
    from sae_ray.concepts.word_names import Texts as Texts

__getattr__ = exports(
    __name__,
    {
        "agreeing": ["Agreement", "Pairs", "agreement"],
        "atoms": ["coherence"],
        "benchmark": ["read_benchmark"],
        "best_words": ["BestWords"],
        "concept_files": ["read_concepts"],
        "config": ["Concepts"],
        "correlations": ["correlation", "label_correlation"],
        "cosines": ["cosine", "cosine_cubed", "decoder_cosine"],
        "dissect": ["soft_wpmi", "wpmi"],
        "entropies": ["entropy", "label_entropy"],
        "feature_monosemanticity": ["FMS", "fms"],
        "hierarchy": ["group_means", "lca_counts", "lca_depth", "lca_mode"],
        "label_scoring": ["LabelScores", "LabelSummary", "label_scores", "label_summary"],
        "labelling": ["Concept", "best_of_each", "image_classes", "label_concepts", "mean_embeddings", "search"],
        "labels": ["Labels"],
        "logistic_probes": [
            "BestProbes",
            "JudgedProbes",
            "LatentProbes",
            "best_probes",
            "judge_probes",
            "latent_probes",
        ],
        "measuring": ["measure"],
        "naming": ["class_names", "class_of"],
        "naming_by_answers": [
            "AnsweredNames",
            "Trials",
            "affirms",
            "answered_names",
            "name_scores",
            "random_images",
            "trials",
        ],
        "orders": ["rank_reorder"],
        "overlap": ["Uniqueness", "count_above", "shared_pairs", "uniqueness"],
        "ranking": ["average_precisions"],
        "recovery": ["QStar", "k_unique", "largest_k", "q_star", "q_star_of_ridge", "rip_bound", "welch_bound"],
        "second_moment": ["SecondMoment", "aip_cosines", "mean_angle", "whitening"],
        "sparse_probes": ["SparseProbe", "purity", "sparse_probing"],
        "spatial": ["morans_i"],
        "splits": ["Halves", "balanced_rows", "halves", "shuffled_labels"],
        "stability": ["matched_cosine"],
        "statistics": ["ClassStats", "merged"],
        "tables": ["ConceptTables"],
        "targeted_perturbation": ["TPP", "tpp"],
        "taxonomy": ["image_paths", "inaturalist_taxonomy", "read_taxonomy"],
        "vocabulary": ["Vocabulary", "class_vocabulary", "read_vocabulary"],
        "word_names": ["Texts"],
    },
)
